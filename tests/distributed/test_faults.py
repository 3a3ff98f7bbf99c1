"""A rank that is killed ends the run soon, with a message, and the run can be resumed."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest

from tests.distributed.launch import Bench, diary, drift, saver

LIMIT = 60.0
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("overlay", "rank", "torchrun"), [("ddp", 0, False), ("fsdp2", 1, False), ("ddp", 1, True)]
)
def test_a_killed_rank_ends_the_run_which_resumes(
    overlay: str, rank: int, torchrun: bool, bench: Bench
) -> None:
    keys = {"trainer__max_steps": 8, "torchrun": torchrun}
    whole = diary(bench.fit("whole", "recover", overlay, 2, **keys))
    note, saved = bench.out / "note", bench.out / "saved"
    death = f"tests.distributed.rows.Killed={{rank: {rank}, step: 5, note: {note}}}"
    broken = bench.start("broken", "recover", overlay, 2, callbacks=[saver(saved, 2), death], **keys)
    waited = time.time() - float(note.read_text())
    assert waited < LIMIT, "every process has ended by then"
    assert broken.returncode != 0
    assert "another process of this run broke" in broken.stderr or "was lost" in broken.stderr
    assert "--ckpt_path" in broken.stderr, "it says how to go on"
    assert not (saved / "step=6.ckpt").exists()
    resumed = bench.fit("resumed", "recover", overlay, 2, ckpt_path=saved / "step=4.ckpt", **keys)
    assert drift(whole[4:], diary(resumed), "loss")[0] == 0.0, "the very same steps"


@pytest.mark.parametrize(
    ("stage", "overlay", "rank", "number"),
    [
        ("recover", "ddp", 1, signal.SIGTERM),
        ("recover", "fsdp2", 0, signal.SIGINT),
        ("search", "ddp", 0, signal.SIGTERM),
        ("search", "fsdp2", 1, signal.SIGINT),
        ("search", "fsdp2", 0, signal.SIGTERM),
    ],
)
def test_a_rank_that_is_told_to_end_stops_all_after_the_same_step(
    stage: str, overlay: str, rank: int, number: signal.Signals, bench: Bench
) -> None:
    """Whichever rank is told, and whatever the beat of its checkpoints: the step at hand is saved whole."""
    keys: dict[str, Any] = {"trainer__max_steps": 8}
    whole = diary(bench.fit("whole", stage, overlay, 2, **keys))
    about = f"rank: {rank}, step: 5, note: {bench.out / 'note'}, number: {number}"
    told = f"tests.distributed.rows.Killed={{{about}}}"
    stopped = bench.start("told", stage, overlay, 2, callbacks=[told], **keys)
    assert stopped.returncode == 128 + number, stopped.stderr[-3000:]
    (last,) = (bench.out / "told").rglob("last.ckpt")
    assert (
        f"stopped at step 6 of 8; resume with the same command and --ckpt_path {last} ({number.name})"
        in stopped.stderr
    )
    assert stopped.stderr.count("stopped at step") == 1, "one rank speaks for all"
    assert "Traceback" not in stopped.stderr
    assert not [*(bench.out / "told").rglob("mask.json"), *(bench.out / "told").rglob("record.json")]
    resumed = bench.fit("resumed", stage, overlay, 2, ckpt_path=last, **keys)
    assert drift(whole[6:], diary(resumed), "loss")[0] == 0.0, "the very same steps"


def test_two_processes_are_refused_with_one_message(bench: Bench) -> None:
    """A pair that cannot work is refused before the second process starts."""
    keys = {"model__init_args__quantize": "int8"}
    done = bench.start("refused", "search", "fsdp2", 2, **keys)
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    assert "model.quantize" in done.stderr
