"""One command: stages run once, go on where they stopped, and run again only if what they rest on changes."""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from src.cli import run
from src.data import Corpus
from src.data.arithmetic import problems
from src.errors import ConfigError
from src.shorten import settings, stages, verb
from src.shorten.settings import choose
from src.shorten.stages import Stage, digests, work_through
from src.shorten.text import SHARE, Text, hold_out, look


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the stages that are run; each leaves its product and what it would resume from."""
    names: list[str] = []

    def status(stage: Stage) -> int:
        names.append(stage.name)
        if stage.folder is not None:
            stage.folder.mkdir(parents=True, exist_ok=True)
            (stage.folder / "last.ckpt").touch()
        if stage.argv[-1] == "fails":
            return 3
        stage.product.parent.mkdir(parents=True, exist_ok=True)
        stage.product.touch()
        return 0

    monkeypatch.setattr(stages, "_status", status)
    return names


def line(at: Path) -> list[Stage]:
    """A search, a recovery after it, and a judgement of the search alone."""
    return [
        Stage("search", ("fit",), at / "search/mask.json", folder=at / "search", facts=("w",)),
        Stage("recover", ("fit", "r"), at / "recover/record.json", ("search",), ("w",), at / "recover"),
        Stage("judge", ("evaluate",), at / "evaluate.json", ("search",)),
    ]


def test_what_is_done_is_not_done_again(tmp_path: Path, ran: list[str]) -> None:
    for _ in range(2):
        work_through(line(tmp_path), tmp_path / "stages.json")
    assert ran == ["search", "recover", "judge"]
    (tmp_path / "evaluate.json").unlink()
    work_through(line(tmp_path), tmp_path / "stages.json")
    assert ran[3:] == ["judge"]


@pytest.mark.parametrize(
    ("changed", "again"), [(0, ["search", "recover", "judge"]), (1, ["recover"]), (2, ["judge"])]
)
@pytest.mark.parametrize("key", ["argv", "facts"])
def test_a_change_runs_its_stage_and_those_behind_it(
    changed: int, again: list[str], key: str, tmp_path: Path, ran: list[str]
) -> None:
    work_through(line(tmp_path), tmp_path / "stages.json")
    del ran[:]
    other = line(tmp_path)
    other[changed] = replace(other[changed], **{key: ("other",)})
    work_through(other, tmp_path / "stages.json")
    assert ran == again


def test_a_failed_stage_ends_the_run_and_goes_on_from_what_it_left(tmp_path: Path, ran: list[str]) -> None:
    log, whole = tmp_path / "stages.json", line(tmp_path)
    failing = [whole[0], replace(whole[1], argv=("fit", "fails")), whole[2]]
    for _ in range(2):  # the second time its folder is still there
        with pytest.raises(SystemExit) as stop:
            work_through(failing, log)
        assert stop.value.code == 3
        assert (tmp_path / "recover/last.ckpt").exists()
    assert ran == ["search", "recover", "recover"]
    (tmp_path / "recover/mark").touch()
    work_through(whole, log)  # another command: what the failed one left is not gone on from
    assert not (tmp_path / "recover/mark").exists()
    assert ran[3:] == ["recover", "judge"]


def test_a_folder_of_another_origin_is_refused_and_stays(tmp_path: Path, ran: list[str]) -> None:
    (tmp_path / "search").mkdir()
    (tmp_path / "search/precious").touch()
    with pytest.raises(ConfigError, match="is there already, and not from this command"):
        work_through(line(tmp_path), tmp_path / "stages.json")
    assert (tmp_path / "search/precious").exists()
    assert ran == []


def test_digests_differ_where_products_may(tmp_path: Path) -> None:
    plain = line(tmp_path)
    assert digests(plain) == digests(line(tmp_path / "elsewhere"))
    assert len(set(digests(plain).values())) == 3


# ------------------------------------------------------------------ settings


def chosen(model: str, text: Text, tokens: int | None = None) -> dict[tuple[str, str], settings.Choice]:
    return {(c.stage, c.option.split(".")[-1]): c for c in choose(model, text, tokens)}


def test_rates_fall_with_size_and_steps_hold_as_many_tokens(
    monkeypatch: pytest.MonkeyPatch, teacher_dir: str
) -> None:
    rates = []
    for count in (260_000, 1_600_000, 135_000_000, 7_000_000_000):
        monkeypatch.setattr(settings, "weights", lambda _, count=count: count)
        rates.append(float(chosen(teacher_dir, Text(100, 10_000, 100, True))["recover", "lr"].value))
    assert rates[0] == rates[1] == 7e-4
    assert rates[1] > rates[2] > rates[3]
    assert rates[2] == pytest.approx(1e-4, rel=0.3)
    assert rates[3] == pytest.approx(1e-5, rel=0.3)
    for length, tokens in itertools.product((40, 100, 700), (20_000, 500_000, 3_000_000)):
        found = chosen(teacher_dir, Text(1000, 500 * length, length, False), tokens)
        rows, steps = found["recover", "batch_size"].value, found["recover", "max_steps"].value
        assert length <= found["recover", "max_length"].value < length + 64
        assert steps == 20 or steps * rows * length / 2 == pytest.approx(tokens, rel=0.05)


def test_text_that_ends_is_read_several_times(teacher_dir: str) -> None:
    small, large = (chosen(teacher_dir, Text(1000, 500_000, 500, whole)) for whole in (True, False))
    once, often = (found["recover", "max_steps"].value for found in (large, small))
    assert often == pytest.approx(settings.PASSES * once, rel=0.01)


def test_a_corpus_is_looked_at_and_divided(tmp_path: Path, teacher_dir: str) -> None:
    corpus = tmp_path / "train.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in problems("train", 300, 0)))
    found = look(teacher_dir, str(corpus))
    assert (found.documents, found.whole) == (300, True)
    hold_out(teacher_dir, str(corpus), tmp_path / "held_out.jsonl")
    kept = (tmp_path / "held_out.jsonl").read_text().splitlines()
    trained = Corpus(tokenizer=teacher_dir, train=str(corpus), held_out=SHARE).predict_dataloader()
    assert sum(len(batch["input_ids"]) for batch in trained) == 300 - len(kept) < 300
    assert set(kept) <= set(corpus.read_text().splitlines())


# ------------------------------------------------------------------ the verb


def parsed(tmp_path: Path, teacher_dir: str, corpus_file: str, *more: str) -> argparse.Namespace:
    return verb._parse(
        ["--model", teacher_dir, "--train", corpus_file, "--run", str(tmp_path / "run"), *more]
    )


def lined(args: argparse.Namespace, tmp_path: Path) -> dict[str, Stage]:
    made = verb.stages(args, tmp_path / "run", {"search": [], "recover": []}, verb._facts(args))
    return {stage.name: stage for stage in made}


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
    assert settled() == first
    monkeypatch.setattr(verb, "look", lambda *_: pytest.fail("the text is looked at again"))
    assert settled() == settled("--dry-run") == first
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
        ([], ["--model.init_args.ratio", "0.25"]),
        (["--remove", "2"], ["--model.init_args.ratio", "null", "--model.init_args.remove", "2"]),
        (["--target", "{speedup: 1.3}"], ["null", "--model.init_args.target", "{speedup: 1.3}"]),
        (["--unit", "half", "--ratio", "0.5"], ["0.5", "--model.init_args.unit", "half"]),
    ],
)
def test_how_much_goes_is_said_in_one_way_alone(
    more: list[str], expected: list[str], tmp_path: Path, teacher_dir: str, corpus_file: str
) -> None:
    given = verb._what(parsed(tmp_path, teacher_dir, corpus_file, *more))
    keys = dict(zip(given[::2], given[1::2], strict=True))
    assert all(part in given for part in expected)
    amounts = ("ratio", "remove", "target")
    assert sum(keys.get(f"--model.init_args.{key}", "null") != "null" for key in amounts) == 1


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
