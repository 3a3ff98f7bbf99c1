"""Thirty kills at random moments of a search, a recovery and a cache: nothing is lost, to the last bit.

Checkpoints have 100 MB and more, and ``TMPDIR`` is on another file system than the run, where there is one.
"""

from __future__ import annotations

import random
import signal
import tempfile
import time
from pathlib import Path

import pytest

from tests.faults.runs import Files, apart, assert_same, state, status

KILLS, IN_A_ROW, STEPS = 30, 10, 12
BALLAST = "--trainer.callbacks+=tests.faults.runs.Ballast"
COMPARED = ("state_dict", "optimizer_states", "lr_schedulers", "budget", "recovery", "callbacks")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stage", ["search", "recover", "cache"])
def test_killed_at_random_and_resumed_is_the_uninterrupted_run(stage: str, files: Files) -> None:
    rng, kills, began = random.Random(0), 0, time.monotonic()
    argv = _argv(files, stage, "whole")
    with tempfile.TemporaryDirectory(dir=_elsewhere(files.out)) as temporary:
        assert status(apart(argv, temporary=temporary)) == 0
        length = time.monotonic() - began
        for number in range(KILLS):
            version = f"killed-{number}"
            argv = _argv(files, stage, version)
            for _ in range(IN_A_ROW):
                before = _done(files, stage, version)
                child = apart(_resumed(files, stage, version, argv), temporary=temporary)
                time.sleep(rng.uniform(0.1, 0.7) * length)
                child.kill()
                code = status(child)
                assert code in (0, -signal.SIGKILL), "what is resumed goes on"
                kills += code != 0
                assert _done(files, stage, version) >= before, "no progress is lost"
            assert status(apart(_resumed(files, stage, version, argv), temporary=temporary)) == 0
            _assert_equal(files, stage, version)
            if kills >= KILLS:
                break
        print(f"\n{stage}: {kills} kills over {number + 1} runs; TMPDIR {temporary}, run {files.out}")
    assert kills >= KILLS


def _argv(files: Files, stage: str, version: str) -> list[str]:
    more = [] if stage == "cache" else [BALLAST]
    return files.command(stage, version, *more, steps=STEPS, every=2)


def _resumed(files: Files, stage: str, version: str, argv: list[str]) -> list[str]:
    last = files.last(stage, version)
    return [*argv, f"--ckpt_path={last}"] if last.exists() else argv


def _done(files: Files, stage: str, version: str) -> int:
    """Steps in the last checkpoint, or finished shards."""
    if stage == "cache":
        return len(list(files.directory(stage, version).glob("part-0/*.parquet")))
    last = files.last(stage, version)
    if not last.exists():
        return 0
    assert last.stat().st_size > 100e6
    return int(state(last)["global_step"])


def _assert_equal(files: Files, stage: str, version: str) -> None:
    whole, killed = files.directory(stage, "whole"), files.directory(stage, version)
    assert not [file for file in killed.rglob(".*.*") if file.name != ".lock"], "no litter"
    if stage == "cache":
        one, other = ({f.name: f.read_bytes() for f in d.glob("part-0/*")} for d in (whole, killed))
        assert one == other
        return
    one, other = (state(files.last(stage, name)) for name in ("whole", version))
    for key in COMPARED:
        if key in one:
            assert_same(_lasting(one[key]), _lasting(other[key]), key)
    if stage == "search":
        assert (whole / "mask.json").read_bytes() == (killed / "mask.json").read_bytes()
    assert (killed / "record.json").exists()


def _lasting(value: object) -> object:
    """A part of a checkpoint without paths and seconds, in which two runs differ."""
    if isinstance(value, dict):
        return {
            key: _lasting(part)
            for key, part in value.items()
            if key != "seconds" and "Checkpoint" not in str(key) and "Throughput" not in str(key)
        }
    return value


def _elsewhere(run: Path) -> str | None:
    """A directory on another file system."""
    shared = Path("/dev/shm")
    return str(shared) if shared.is_dir() and shared.stat().st_dev != run.stat().st_dev else None
