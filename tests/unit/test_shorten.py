"""The one command chooses settings for model and text, and says which stages they are for."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from src.cli import run
from src.data import Corpus
from src.data.arithmetic import problems
from src.data.columns import WELL_KNOWN
from src.errors import ConfigError
from src.models import fingerprint as models
from src.plan.experiment import Experiment
from src.shorten import settings, verb
from src.shorten.settings import choose
from src.shorten.stages import Stage, digests
from src.shorten.text import SHARE, Text, hold_out, look
from tests.faults.directories import refused
from tests.marks import slow


def chosen(model: str, text: Text, tokens: int | None = None) -> dict[tuple[str, str], settings.Choice]:
    return {(c.stage, c.option.split(".")[-1]): c for c in choose(model, text, tokens)}


def test_rates_fall_with_size_and_steps_hold_as_many_tokens(
    monkeypatch: pytest.MonkeyPatch, teacher_dir: str
) -> None:
    rates = []
    for count in (260_000, 1_600_000, 135_000_000, 7_000_000_000):
        monkeypatch.setattr(settings, "weights", lambda _, count=count: count)
        rates.append(float(chosen(teacher_dir, Text(100, 10_000, 100, False))["recover", "lr"].value))
    assert rates == [7e-4, 7e-4, 3e-4, 1e-5], "those that are known, and none beyond"
    steps = [settings._rate(round(10**power), again) for again in (False, True) for power in (7, 7.5, 9, 9.5)]
    assert steps == sorted(steps[:4], reverse=True) + sorted(steps[4:], reverse=True)
    assert 3e-4 < steps[0] < steps[4] < 1e-3
    assert 1e-5 < steps[3] == steps[7] < 3e-4
    for length, tokens in itertools.product((40, 100, 700), (20_000, 500_000, 3_000_000)):
        found = chosen(teacher_dir, Text(1000, 500 * length, length, False), tokens)
        rows, steps = found["recover", "batch_size"].value, found["recover", "max_steps"].value
        assert length <= found["recover", "max_length"].value < length + 64
        assert steps == 20 or steps * rows * length / 2 == pytest.approx(tokens, rel=0.05)


def test_text_that_ends_is_read_several_times(teacher_dir: str) -> None:
    """As it was measured: the parent's streams too, a higher rate, and small batches where rows are few."""
    small, large = (chosen(teacher_dir, Text(1000, 500_000, 500, whole)) for whole in (True, False))
    for found in (small, large):  # a text of one row more than is looked at is not read less
        processed = found["recover", "max_steps"].value * found["recover", "batch_size"].value
        assert processed == pytest.approx(1000 * settings.PASSES, rel=0.01)
    assert "of its first 1,000 documents; --tokens for more" in large["recover", "max_steps"].reason
    assert small["recover", "terms"].value == settings.HIDDEN_STATES
    assert ("recover", "terms") not in large
    assert float(small["recover", "lr"].value) > float(large["recover", "lr"].value)
    few = chosen(teacher_dir, Text(748, 748 * 69, 90, True))
    assert [few["recover", key].value for key in ("batch_size", "max_steps")] == [8, 748]
    assert ("recover", "terms") not in chosen(teacher_dir, Text(748, 748 * 69, 90, True), tokens=50_000)


@pytest.mark.parametrize(("fast", "count"), [(True, 10**9), (False, 10**9), (True, 10**6)])
def test_bf16_is_chosen_where_it_pays(
    fast: bool, count: int, monkeypatch: pytest.MonkeyPatch, teacher_dir: str
) -> None:
    speeds = {"float32": 1.0, "bfloat16": 4.0 if fast else 1.2}
    monkeypatch.setattr(settings, "device", lambda _: SimpleNamespace(tflops=speeds))
    monkeypatch.setattr(settings, "weights", lambda _: count)
    found = chosen(teacher_dir, Text(100, 10_000, 100, False))
    wanted = {
        ("search", "dtype"): "bfloat16",
        ("recover", "dtype"): "bfloat16",
        ("recover", "precision"): "bf16-mixed",
    }
    pays = fast and count >= settings.LARGE
    assert {key: found[key].value for key in wanted if key in found} == (wanted if pays else {})


def test_a_corpus_is_looked_at_and_divided(tmp_path: Path, teacher_dir: str) -> None:
    corpus = tmp_path / "train.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in problems("train", 300, 0)))
    found = look(teacher_dir, str(corpus), WELL_KNOWN)
    assert (found.documents, found.whole) == (300, True)
    kept = hold_out(teacher_dir, str(corpus), WELL_KNOWN).splitlines()
    trained = Corpus(tokenizer=teacher_dir, train=str(corpus), held_out=SHARE).predict_dataloader()
    assert sum(len(batch["input_ids"]) for batch in trained) == 300 - len(kept) < 300
    assert set(kept) <= set(corpus.read_text().splitlines())


# ------------------------------------------------------------------ the verb

NO_TARGET = "--target: .*such as '{speedup: 1.3}'"


def parsed(tmp_path: Path, teacher_dir: str, corpus_file: str, *more: str) -> argparse.Namespace:
    return verb.parse(["--model", teacher_dir, "--train", corpus_file, "--run", str(tmp_path / "run"), *more])


def part_of(corpus_file: str, tmp_path: Path) -> str:
    """A file of other content."""
    part = tmp_path / "part.jsonl"
    part.write_text("".join(Path(corpus_file).read_text().splitlines(keepends=True)[:8]))
    return str(part)


def test_a_model_is_not_judged_by_the_text_that_trains_it(
    tmp_path: Path, teacher_dir: str, corpus_file: str
) -> None:
    copy = shutil.copy(corpus_file, tmp_path / "copy.jsonl")
    for held_out in (corpus_file, str(copy)):
        with pytest.raises(ConfigError, match=r"--held-out: .* holds rows of --train"):
            verb._facts(parsed(tmp_path, teacher_dir, corpus_file, "--held-out", held_out))
    other = parsed(tmp_path, teacher_dir, corpus_file, "--held-out", part_of(corpus_file, tmp_path))
    assert len(set(verb._facts(other))) == 3
    Path(other.held_out).write_text("")
    with pytest.raises(ConfigError, match=r"part\.jsonl is empty"):
        verb._chosen(other)


def lined(args: argparse.Namespace, tmp_path: Path) -> dict[str, Stage]:
    made = verb.stages(args, tmp_path / "run", {"search": [], "recover": []}, verb._facts(args))
    return {stage.name: stage for stage in made}


@pytest.mark.slow
def test_settings_are_chosen_once_and_again_when_something_else_is_asked_for(
    tmp_path: Path, teacher_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, kept = tmp_path / "text.jsonl", tmp_path / "run" / verb.HELD_OUT

    def write(seed: int) -> None:
        text.write_text("".join(json.dumps(row) + "\n" for row in problems("train", 300, seed)))

    def settled(*more: str) -> Any:
        args = parsed(tmp_path, teacher_dir, str(text), *more)
        return verb.settled(args, tmp_path / "run", verb._facts(args))

    write(0)
    first = settled()
    write(1)
    settled()  # another text at the same place: rows held out of the old one may be trained on now
    assert {*kept.read_text().splitlines()} <= {*text.read_text().splitlines()}
    write(0)
    anew = settled()
    assert anew[:2] == first[:2], "but for minutes, which depend on how busy the machine is"
    monkeypatch.setattr(verb, "look", lambda *_: pytest.fail("the text is looked at again"))
    assert settled() == settled("--dry-run") == anew
    with pytest.raises(pytest.fail.Exception, match="looked at again"):
        settled("--tokens", "9K")


@pytest.mark.parametrize(
    ("more", "again"),
    [
        (["--out", "elsewhere"], {"export", "evaluate", "benchmark", "report"}),
        (["--seed", "3"], {"search", "recover", "cut", "export", "evaluate", "benchmark", "report"}),
        (["--method", "sleb"], {"search", "recover", "cut", "export", "evaluate", "benchmark", "report"}),
        ([], set()),
    ],
)
def test_an_option_runs_again_what_depends_on_it_and_nothing_else(
    more: list[str], again: set[str], tmp_path: Path, teacher_dir: str, corpus_file: str
) -> None:
    plain, other = (
        digests(list(lined(parsed(tmp_path, teacher_dir, corpus_file, *extra), tmp_path).values()))
        for extra in ([], more)
    )
    assert {name for name in plain if plain[name] != other[name]} == again


def test_other_weights_or_another_text_at_the_same_place_run_everything_again(
    tmp_path: Path, teacher_dir: str
) -> None:
    model, text = tmp_path / "model", tmp_path / "text.jsonl"
    shutil.copytree(teacher_dir, model)
    text.write_text("".join(json.dumps(row) + "\n" for row in problems("train", 9, 0)))
    args = parsed(tmp_path, str(model), str(text))
    before = digests(list(lined(args, tmp_path).values()))
    text.write_text("".join(json.dumps(row) + "\n" for row in problems("train", 9, 1)))
    other_text = digests(list(lined(args, tmp_path).values()))
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] += 1.0
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    other_weights = digests(list(lined(args, tmp_path).values()))
    for name in before:
        assert len({before[name], other_text[name], other_weights[name]}) == 3, name


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([], {"ratio": "0.25"}),
        (["--remove", "2"], {"ratio": "null", "remove": "2"}),
        (["--target", "{speedup: 1.3}"], {"ratio": "null", "target": "{speedup: 1.3}"}),
        (["--unit", "half", "--ratio", "0.5"], {"ratio": "0.5", "unit": "half"}),
    ],
)
def test_how_much_goes_is_said_in_one_way_alone(
    more: list[str], expected: dict[str, str], tmp_path: Path, teacher_dir: str, corpus_file: str
) -> None:
    given = verb._what(parsed(tmp_path, teacher_dir, corpus_file, *more))
    keys = dict(part.removeprefix("--model.init_args.").split("=", 1) for part in given)
    assert expected.items() <= keys.items()
    assert sum(keys.get(key, "null") != "null" for key in ("ratio", "remove", "target")) == 1
    with pytest.raises(ConfigError, match="--remove: not allowed with argument --ratio"):
        parsed(tmp_path, teacher_dir, corpus_file, "--ratio=0.25", "--remove=2")


def test_an_unknown_method_is_refused_before_anything_is_written(tmp_path: Path, teacher_dir: str) -> None:
    with pytest.raises(ConfigError, match=r"--method: 'slep' given; .*sleb"):
        run(
            [
                "shorten",
                "--model",
                teacher_dir,
                "--train",
                "x",
                "--method",
                "slep",
                "--run",
                str(tmp_path / "r"),
            ]
        )
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("more", "depth"), [((), 4), slow(("--remove", "1"), 5), slow(("--ratio", "0.5"), 3)]
)
def test_both_stages_are_planned_for_what_goes(
    more: tuple[str, ...],
    depth: int,
    tmp_path: Path,
    teacher_dir: str,
    corpus_file: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also the recovery, whose mask does not exist yet."""
    planned: list[Experiment] = []
    monkeypatch.setattr(verb, "fitted", lambda experiment: (planned.append(experiment), "nowhere"))
    verb._chosen(parsed(tmp_path, teacher_dir, corpus_file, *more))
    assert [(e.stage, e.mask and e.mask.depth) for e in planned] == [("search", depth), ("recover", depth)]


def test_a_model_of_the_hub_is_the_same_before_and_after_it_is_downloaded(
    tmp_path: Path, corpus_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are not there when a search begins, and are when the search is resumed."""
    monkeypatch.setattr(models, "load_config", lambda _: argparse.Namespace(_commit_hash="c0ffee"))
    found = []
    for weights in (None, "w1-0"):
        monkeypatch.setattr(models, "weights_fingerprint", lambda _, weights=weights: weights)
        found.append(verb._facts(parsed(tmp_path, "org/model", corpus_file)))
    assert found[0] == found[1]
    assert found[0][0] == "c0ffee"


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--search", "it's", "--search: .*inside of a quotation"),
        ("--out", "/dev/zero/x", "--out: .*no directory"),
        ("--run", "/dev/zero", "--run: .*no directory"), ("--held-out", "", "--held-out: an empty name"),
        ("--seed", str(2**32), "--seed: .*accepted: a whole number"), ("--train", "none.jsonl", "--train: "),
        ("--target", "{}", "model.target: .*exactly one of"),
        ("--target", "fast", NO_TARGET), ("--target", "1.3", NO_TARGET), ("--target", "{a", NO_TARGET),
        ("--remove", "6", "Accepted: 1 to 5"),
        ("--unit", "halves", "--unit: 'halves' given; accepted: 'layer', "),
        ("--held-out", "/dev/null", "--held-out: .*no regular file"),
        ("--train", "", "--train: an empty name"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_told_before_anything_runs(
    option: str,
    value: str,
    told: str,
    tmp_path: Path,
    teacher_dir: str,
    corpus_file: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = {"--model": teacher_dir, "--train": corpus_file, "--held-out": part_of(corpus_file, tmp_path)}
    given |= {"--run": str(tmp_path / "run"), option: value}
    assert re.search(told, refused(["shorten", *(f"{key}={name}" for key, name in given.items())], capsys))
    assert not (tmp_path / "run").exists()
