"""Columns of the user's own names, and splits of one dataset, are read by every stage of the one command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from src.command import Parser
from src.data.arithmetic import problems
from src.data.columns import WELL_KNOWN
from src.data.options import add_columns, read_columns
from src.errors import ConfigError
from src.plan.experiment import Experiment
from src.shorten import settings, verb
from src.shorten.options import columns_of_evaluate, columns_of_fit, place
from src.shorten.text import hold_out, look


def test_columns_that_the_user_names_reach_every_stage(tmp_path: Path, teacher_dir: str) -> None:
    """Under their own names the rows cannot be read, and what a stage reads is what well-known names give."""
    plain, own = tmp_path / "plain.jsonl", tmp_path / "own.jsonl"
    rows = list(problems("train", 200, 0))
    plain.write_text(
        "".join(json.dumps({"prompt": r["question"], "answer": r["answer"]}) + "\n" for r in rows)
    )
    own.write_text(
        "".join(json.dumps({"asked": r["question"], "told": r["answer"], "tools": "x"}) + "\n" for r in rows)
    )
    given = ["--model", teacher_dir, "--train", str(own), "--run", str(tmp_path / "run")]
    with pytest.raises(ConfigError, match=r"data\.columns"):
        verb._chosen(verb.parse(given))
    args = verb.parse([*given, "--prompt", "asked", "--answer", "told", "--ignore", "tools"])
    columns = read_columns(args)
    assert look(teacher_dir, str(own), columns) == look(teacher_dir, str(plain), WELL_KNOWN)
    kept = [json.loads(line)["asked"] for line in hold_out(teacher_dir, str(own), columns).splitlines()]
    assert set(kept) < {row["question"] for row in rows}
    made = verb.stages(args, tmp_path / "run", {"search": [], "recover": []}, verb._facts(args))
    stages = {stage.name: stage for stage in made}
    for name in ("search", "recover"):
        command = [part for part in stages[name].argv if part.startswith("--data.init_args.columns")]
        config = ["--config", settings.RECOVER, "--model.init_args.model", teacher_dir]
        read = Experiment([*config, *command], length=64).data.columns
        assert (read.prompt, read.answer, tuple(read.ignore)) == ("asked", "told", ("tools",))
    assert {"--prompt=asked", "--answer=told", "--ignore=tools"} < {*stages["evaluate"].argv}
    with pytest.raises(ConfigError, match="--held-out"):
        verb.parse([*given, "--split", "test"])


@pytest.mark.parametrize(
    ("prompt", "answer", "ignored"),
    [
        ("a: b", "[x]", ("-i", "1e3", "2026-13-32")),
        ("-q", "é #1", ("{c: d}", "'a\"", "x.yaml")),
    ],
)
def test_each_stage_reads_a_name_as_it_is_written(
    prompt: str, answer: str, ignored: tuple[str, ...], teacher_dir: str
) -> None:
    """Also one that YAML or the command line would take for something else; further keys add to it."""
    given = ["--model", teacher_dir, "--train", "t", f"--prompt={prompt}", f"--answer={answer}"]
    args = verb.parse([*given, *(f"--ignore={name}" for name in ignored)])
    more = ["--data.init_args.columns.roles={tutor: user}", "--model.init_args.model", teacher_dir]
    fitted = Experiment(["--config", settings.RECOVER, *columns_of_fit(args), *more], length=64).data.columns
    assert (fitted.prompt, fitted.answer, tuple(fitted.ignore)) == (prompt, answer, ignored)
    assert fitted.roles == {"tutor": "user"}
    add_columns(parser := Parser("evaluate", ""))
    assert read_columns(parser.parse_args(columns_of_evaluate(args))) == read_columns(args)


@pytest.mark.parametrize("name", ["null", "~", "", "# x"])
@pytest.mark.parametrize("option", ["--text", "--ignore"])
def test_a_name_that_no_fit_can_read_is_refused(option: str, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{option}: '{name}' given, .* accepted: a column of"):
        verb.parse(["--model", "m", "--train", "t", f"{option}={name}"])


def test_a_split_of_the_dataset_that_trains_is_judged_by(tmp_path: Path, teacher_dir: str) -> None:
    """And no split is both; which rows train is said by the name ``train``."""
    rows = list(problems("train", 9, 0))
    place = str(tmp_path / "saved")
    DatasetDict({"train": Dataset.from_list(rows[:6]), "a b": Dataset.from_list(rows[6:])}).save_to_disk(
        place
    )
    given = ["--model", teacher_dir, "--train", place, "--held-out", place, "--split"]
    train, judge = verb._facts(verb.parse([*given, "a b"]))[1:]
    assert train == verb._facts(verb.parse(given[:4]))[1] != judge
    with pytest.raises(ConfigError, match="holds rows of --train"):
        verb._facts(verb.parse([*given, "train"]))
    with pytest.raises(ConfigError, match=r"^--held-out: data: '.*' has no split 'b', only train, a b\.$"):
        verb._facts(verb.parse([*given, "b"]))


def test_splits_of_the_hub_are_told_apart_though_they_have_one_commit(
    teacher_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "fingerprint", lambda source: f"commit of {source.path}")
    given = ["--model", teacher_dir, "--train", "org/data", "--held-out"]
    assert len({*verb._facts(verb.parse([*given, "org/data", "--split", "test"]))}) == 2
    assert len({*verb._facts(verb.parse([*given, "org/more", "--split", "train"]))}) == 3
    for split in ([], ["--split", "train"]):  # the only split of a dataset needs no name
        with pytest.raises(ConfigError, match="holds rows of --train"):
            verb._facts(verb.parse([*given, "org/data", *split]))


def test_a_place_keeps_the_name_that_leads_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made shorter only where that names the same file, and nothing else to a command line or YAML."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real" / "sub").mkdir(parents=True)
    (tmp_path / "data").symlink_to("real/sub")
    for name in ("text", "real/text", "-text", "null", "2026-13-45"):
        (tmp_path / name).touch()
    assert [place(f"{tmp_path}/text"), place("./text"), place("real/../text")] == ["text"] * 3
    for name in ("data/../text", "./-text", "./null", f"{tmp_path}/null", "no/such", "./2026-13-45"):
        assert place(name) == name
