"""Stages run once, go on where they stopped, and run again where something changed; what is foreign stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from src import benchmark
from src.errors import ConfigError
from src.shorten import settings, stages, verb
from src.shorten.stages import Stage, digests, work_through
from src.training import stopping
from src.training.lock import lock
from tests.faults.directories import altered
from tests.faults.runs import forked


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the stages that are run; each leaves its product and what it would resume from."""
    names: list[str] = []

    def status(stage: Stage) -> int:
        names.append(stage.name)
        if stage.resumes:
            stage.place.mkdir(parents=True, exist_ok=True)
            (stage.place / "last.ckpt").touch()
        if stage.argv[-1] == "fails":
            return 3
        stage.product.parent.mkdir(parents=True, exist_ok=True)
        stage.product.touch()
        return 0

    monkeypatch.setattr(Stage, "run", status)
    return names


def line(at: Path) -> list[Stage]:
    """A search, a recovery after it, and a judgement of the search alone."""
    return [
        Stage("search", ("fit",), at / "search", "mask.json", facts=("w",), resumes=True),
        Stage("recover", ("fit", "r"), at / "recover", "record.json", ("search",), ("w",), resumes=True),
        Stage("judge", ("evaluate",), at / "evaluate.json", after=("search",)),
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


@pytest.mark.parametrize("place", ["search", "recover", "evaluate.json"])
def test_what_is_of_another_origin_is_refused_before_anything_runs_and_stays(
    place: str, tmp_path: Path, ran: list[str]
) -> None:
    precious = tmp_path / place if "." in place else tmp_path / place / "precious"
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("mine")
    with pytest.raises(ConfigError, match="is there already, and not from this command"):
        work_through(line(tmp_path), tmp_path / "stages.json")
    assert precious.read_text() == "mine"
    assert ran == []


def test_a_place_that_an_option_names_later_is_of_another_origin_too(tmp_path: Path, ran: list[str]) -> None:
    stages_, other = line(tmp_path), tmp_path / "precious.json"
    work_through(stages_, tmp_path / "stages.json")
    other.write_text("mine")
    with pytest.raises(ConfigError, match="precious"):
        work_through([*stages_[:2], replace(stages_[2], place=other)], tmp_path / "stages.json")
    assert other.read_text() == "mine"


@pytest.mark.parametrize("text", ["", "[]", '{"search": 3}', "{", "\ufeff{}x"])
def test_a_foreign_file_is_not_taken_for_the_log(text: str, tmp_path: Path, ran: list[str]) -> None:
    (tmp_path / "stages.json").write_text(text)
    with pytest.raises(ConfigError, match="not from this command"):
        work_through(line(tmp_path), tmp_path / "stages.json")
    assert (tmp_path / "stages.json").read_text() == text


def test_digests_differ_where_products_may(tmp_path: Path) -> None:
    plain = line(tmp_path)
    assert digests(plain) == digests(line(tmp_path / "elsewhere"))
    assert len(set(digests(plain).values())) == 3


def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str) -> Path:
    """Let a stage be a program that notes its number and then does something; where it notes it."""
    program, number = tmp_path / "program", tmp_path / "number"
    program.write_text(f"#!/bin/sh\necho $$ > {number}.new && mv {number}.new {number}\n{does}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    return number


@pytest.mark.parametrize("number", stopping.SIGNALS)
@pytest.mark.parametrize("early", [True, False])
def test_a_signal_ends_the_stage_at_hand_and_then_the_command(
    number: signal.Signals, early: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that comes while the stage starts."""
    noted, starts = child(tmp_path, monkeypatch, "exec sleep 99"), subprocess.Popen

    def told(command: list[str], **keys: Any) -> subprocess.Popen[bytes]:
        os.kill(os.getpid(), number)
        return starts(command, **keys)

    def work() -> None:
        with stopping.heeded():
            try:
                work_through(line(tmp_path), tmp_path / "stages.json")
            except stopping.Stopped as stop:
                stopping.end(stop)

    if early:
        monkeypatch.setattr(subprocess, "Popen", told)
    process = forked(work)
    while not early and not noted.exists():
        time.sleep(0.01)
    os.kill(process, 0 if early else number)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 128 + number
    if noted.exists():
        with pytest.raises(ProcessLookupError):
            os.kill(int(noted.read_text()), 0)
    assert json.loads((tmp_path / "stages.json").read_text())["search"][0] == stages.BEGUN


def test_a_killed_stage_has_the_status_that_a_shell_gives_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child(tmp_path, monkeypatch, "kill -9 $$")
    with pytest.raises(SystemExit) as stop:
        work_through(line(tmp_path), tmp_path / "stages.json")
    assert stop.value.code == 137


def test_a_dry_run_leaves_what_an_earlier_command_has_written(
    tmp_path: Path,
    teacher_dir: str,
    corpus_file: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A new run gets what its printed commands name; another run's settings are not replaced unasked."""
    place, options = tmp_path / "run", {"search": [], "recover": []}
    monkeypatch.setattr(verb, "_chosen", lambda *_: {"choices": [], "options": options, "notes": []})
    monkeypatch.setattr(verb, "hold_out", lambda *_: "{}\n")
    given = ["--model", teacher_dir, "--train", corpus_file, "--run", str(place), "--dry-run"]
    verb.main(given)
    before = {path: path.read_bytes() for path in place.iterdir()}
    assert {path.name for path in before} >= {verb.SETTINGS, verb.HELD_OUT}
    capsys.readouterr()
    verb.main([*given, "--seed", "1"])
    assert {path: path.read_bytes() for path in place.iterdir()} == before
    assert "give another --run" in capsys.readouterr().out
    (place / verb.HELD_OUT).unlink()
    verb.main(given)
    assert {path: path.read_bytes() for path in place.iterdir()} == before, "rows that are named are there"


@pytest.mark.parametrize("part", ["settings", "work"])
def test_one_command_at_a_time_works_in_a_directory(
    part: str, tmp_path: Path, teacher_dir: str, corpus_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one changes no setting that the first one works by."""
    place, held, options = tmp_path / "run", tmp_path / "held", {"search": [], "recover": []}
    monkeypatch.setattr(verb, "_chosen", lambda *_: {"choices": [], "options": options, "notes": []})
    monkeypatch.setattr(verb, "work_through", lambda *_: pytest.fail("a stage runs"))
    judged_by = tmp_path / "judged.jsonl"
    judged_by.write_text("".join(Path(corpus_file).read_text().splitlines(keepends=True)[:8]))
    texts = ["--train", corpus_file, "--held-out", str(judged_by)]
    given = ["--model", teacher_dir, *texts, "--run", str(place)]
    if part == "work":
        args = verb.parse(given)
        verb.settled(args, place, verb._facts(args))

    def hold() -> None:
        with lock(place, "--run"):
            held.touch()
            signal.pause()

    other = forked(hold)
    while not held.exists():
        time.sleep(0.01)
    before = {path: path.read_bytes() for path in place.iterdir()}
    with pytest.raises(ConfigError, match="--run: another run is writing to"):
        verb.main(given)
    assert {path: path.read_bytes() for path in place.iterdir()} == before
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    with pytest.raises(pytest.fail.Exception, match="a stage runs"):
        verb.main(given)


@pytest.mark.parametrize(
    "name", ["", "..", "search", "cut/x", "evaluate.json", "held_out.jsonl", "stages.json"]
)
def test_no_stage_writes_where_another_does(
    name: str, tmp_path: Path, teacher_dir: str, corpus_file: str
) -> None:
    """The model may lie inside of the run, in a directory of its own."""
    place = tmp_path / "runs/run"
    given = ["--model", teacher_dir, "--train", corpus_file, "--run", str(place), "--out", str(place / name)]
    with pytest.raises(ConfigError, match=r"--out: .* given, and the run keeps '.*' there; accepted: "):
        verb.main(given)
    assert not place.parent.exists()
    verb._check_apart(verb.parse([*given, "--out", str(place / "recovered")]), place)


@pytest.mark.parametrize(("positions", "asked"), [(48, (39, 9)), (159, (128, 31)), (160, None)])
def test_a_model_is_timed_within_its_positions(
    positions: int, asked: tuple[int, int] | None, tmp_path: Path, teacher_dir: str
) -> None:
    model = altered(teacher_dir, tmp_path / "model", max_position_embeddings=positions)
    words = settings.benchmark_lengths(str(model))
    timed = benchmark._parse(["--model", "m", "--baseline", "b", *words])
    assert (timed.prompt_tokens, timed.new_tokens) == (asked or (128, 32))
    assert not asked or sum(asked) == positions


def test_a_place_has_one_name_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the stages of a run are known again; what is no file here stays as it is."""
    (tmp_path / "here/model").mkdir(parents=True)
    (tmp_path / "text").touch()
    monkeypatch.chdir(tmp_path / "here")
    found = [
        verb.parse(["--model", model, "--train", str(tmp_path / "text"), "--run", run, "--out", f"{run}/out"])
        for model, run in (("model", "runs/a"), (f"{tmp_path}/here//model/", f"{tmp_path}/here/runs/a"))
    ]
    assert found[0] == found[1]
    assert found[0].run == "runs/a"
    assert found[0].train == str(tmp_path / "text")
    for name in ("org/model", "hf://org/*.parquet", "https://host//a.jsonl", "*.jsonl"):
        assert verb.parse(["--model", name, "--train", name]).train == name
