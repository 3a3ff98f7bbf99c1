"""A rank that is killed ends the run soon, with a message, and the run can be resumed."""

from __future__ import annotations

import time

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


def test_two_processes_are_refused_with_one_message(bench: Bench) -> None:
    """A pair that cannot work is refused before the second process starts."""
    keys = {"model__init_args__quantize": "int8"}
    done = bench.start("refused", "search", "fsdp2", 2, **keys)
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    assert "model.quantize" in done.stderr
