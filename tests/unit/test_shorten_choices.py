"""What ``shorten`` chooses for its stages: ways that need no other stage, seeds, tokens that can be told."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from pkgutil import resolve_name

import pytest
import yaml

from src.data.columns import WELL_KNOWN
from src.errors import ConfigError
from src.plan.advice import Advice
from src.plan.devices import device
from src.plan.experiment import Experiment
from src.plan.planner import Planner
from src.shorten import settings, verb
from src.shorten.options import POLICIES
from src.shorten.text import untold


def test_a_recovery_without_room_is_quantised_for_no_stage_writes_a_cache(
    tmp_path: Path, teacher_dir: str, corpus_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that is not installed is told before the search, too."""
    argv = ["--config", settings.RECOVER, f"--model.init_args.model={teacher_dir}"]
    argv += [f"--data.init_args.train={corpus_file}", f"--data.init_args.tokenizer={teacher_dir}"]
    planner = Planner(Experiment(argv, 0.25), device("cpu"))

    def fitted(memory: int) -> Advice | None:
        monkeypatch.setattr(settings, "device", lambda _: replace(planner.device, memory=memory))
        return settings.fitted(planner.experiment)[0]

    monkeypatch.setattr(settings, "this_machine", lambda: "cpu")
    cached = planner.way("cached", "single", True).total
    live = min(planner.way(mode, "single", True).total for mode in ("copy", "int8", "nf4"))
    assert cached < live
    assert (found := fitted(live)) is not None
    assert "cache" not in " ".join(found.options)
    offloaded = min(planner.way(mode, "deepspeed_z3", None, True).total for mode in ("int8", "nf4"))
    assert offloaded < live
    monkeypatch.setattr(settings, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"--model: recover: only DeepSpeed.* not installed"):
        fitted(offloaded)
    monkeypatch.setattr(settings, "find_spec", lambda _: "there")
    assert (found := fitted(offloaded)) is not None
    assert "--config configs/strategy/deepspeed_z3.yaml" in found.options
    with pytest.raises(ConfigError, match="--model: Nothing fits"):
        fitted(1)


def test_answers_that_a_template_hides_are_judged_by_all_tokens(tmp_path: Path, teacher_dir: str) -> None:
    """The search and the recovery read such rows, so the judgement behind them does."""
    hidden = Path(shutil.copytree(teacher_dir, tmp_path / "hidden"))
    rewrites = "{% for m in messages %}{{ m.content | upper }}{{ m.content | length }}{% endfor %}"
    (hidden / "chat_template.jinja").write_text(rewrites)
    rows = tmp_path / "chats.jsonl"
    said = [{"role": "user", "content": "two \u2028 and two"}, {"role": "assistant", "content": "it is four"}]
    rows.write_text((json.dumps({"messages": said}, ensure_ascii=False) + "\n") * 60)
    assert "the chat template rewrites" in (untold(str(hidden), None, str(rows), WELL_KNOWN) or "")
    assert "the chat template rewrites" in (untold(str(hidden), rows.read_text(), "none", WELL_KNOWN) or "")
    shown = "{% for m in messages %}{{ m.role + ': ' + m.content + ' ' }}{% endfor %}"
    (hidden / "chat_template.jinja").write_text(shown)
    assert untold(str(hidden), None, str(rows), WELL_KNOWN) is None
    rows.write_text(rows.read_text() + json.dumps({"messages": "odd"}))
    with pytest.raises(ConfigError, match="row 61: the chat is str"):
        untold(str(hidden), None, str(rows), WELL_KNOWN)


def test_the_seed_is_that_of_the_draws_and_of_the_rows(
    tmp_path: Path, teacher_dir: str, corpus_file: str
) -> None:
    """Lightning's own seeds neither: policies and corpora draw from theirs. What a user adds wins."""
    args = verb.parse(["--model", teacher_dir, "--train", corpus_file, "--seed", "3"])
    own = {"search": ["--model.init_args.policy.init_args.seed", "7"], "recover": []}
    made = {stage.name: stage.argv for stage in verb.stages(args, tmp_path, own, [])}
    for name, drawn in (("search", {"policy": "7", "data": "3"}), ("recover", {"data": "3"})):
        given = dict(pairwise(made[name]))  # of an option given twice the last
        assert given["--data.init_args.seed"] == drawn["data"]
        assert given.get("--model.init_args.policy.init_args.seed") == drawn.get("policy")
        assert given["--seed_everything"] == "3"
    args.seed = 0  # the default of each, so that runs of before have the same commands
    for stage in verb.stages(args, tmp_path, {"search": [], "recover": []}, []):
        assert not [part for part in stage.argv if part.endswith("init_args.seed")]


@pytest.mark.parametrize("method", sorted(path.stem for path in POLICIES.glob("*.yaml")))
def test_every_method_has_a_seed(method: str) -> None:
    """``shorten --method`` gives it one."""
    overlay = yaml.safe_load((POLICIES / f"{method}.yaml").read_text())
    policy = overlay["model"]["init_args"]["policy"]
    given = {**(policy.get("init_args") or {}), "seed": 3}
    assert resolve_name(policy["class_path"])(**given).seed == 3
