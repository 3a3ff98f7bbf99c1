"""Report faults that no config causes: memory that ran out, or a rank that was lost."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from subprocess import Popen

import torch
from lightning.pytorch.strategies.launchers import subprocess_script

from src.training import stopping

MEMORY = (
    "error: out of memory{where}. In order of least cost: lower data.init_args.batch_size (and raise "
    "trainer.accumulate_grad_batches by as much), data.init_args.max_length, or "
    "model.init_args.distillation.init_args.chunk_tokens; recompute activations "
    "(--trainer.callbacks+=src.callbacks.CheckpointActivations); hold the frozen weights in 8 or 4 bits "
    "(quantize: int8 or nf4, of the model in a search, of the teacher in a recovery), or distil from a cache "
    "(configs/cache/recover.yaml); shard with --config configs/strategy/fsdp2.yaml. `plan` tells what fits."
)
LOST = (
    "error: {what}. The run has ended. What the lost process said is above; if it said nothing it was "
    "killed, often for memory. Resume with the same command; a fit also with "
    "--ckpt_path <run>/checkpoints/last.ckpt."
)
PARENT = "E3PRUNER_PARENT"
"""Environment variable with the number of the process that a command is to end with."""
GRACE = 20.0
"""Seconds that a process has to end by itself after a signal."""
_OUT = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_GONE = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited", "remote server shutdown")


def explain(error: BaseException | None) -> str | None:
    """Return a message for an error that means that memory ran out or another rank is gone; else None."""
    while error is not None:
        reason = re.sub(r"^\[[^]]*\] ", "", str(error).partition("\n")[0]).partition(". ")[0][:160]
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or _says(error, _OUT):
            return MEMORY.format(where=f" ({reason})" if reason else "")
        if "LOCAL_RANK" in os.environ and _says(error, _GONE):
            return LOST.format(what=f"the connection to another process of this run broke ({reason})")
        error = error.__cause__ or error.__context__
    return None


def _says(error: BaseException, phrases: Iterable[str]) -> bool:
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in phrases)


def watch_parent(period: float = 2.0) -> None:
    """Watch, from a rank or a stage, the process that launched it, and end soon after that process has ended.

    A launcher that is killed cannot tell what it launched to end.

    Args:
        period: seconds between two looks.
    """
    parent = os.getppid()

    def gone() -> str | None:
        return None if os.getppid() == parent else f"the process {parent} that started this one was lost"

    launched = "LOCAL_RANK" in os.environ  # set by what launches ranks: torchrun, or rank 0
    if launched or os.environ.get(PARENT) == str(parent):
        _watch(gone, [], period)


def watch_children(children: list[Popen[bytes]], period: float = 1.0) -> None:
    """Watch the further ranks; end them and this process soon after one of them has failed.

    A rank that waits for a lost one in a collective would wait for half an hour.

    Args:
        children: processes of these ranks.
        period: seconds between two looks.
    """
    stopping.ranks[:] = children

    def failed() -> str | None:
        for rank, child in enumerate(children, start=1):
            if (code := child.poll()) in stopping.STATUSES and stopping.received() is None:
                os.kill(os.getpid(), code - 128)  # one rank alone was told
            if code:
                return f"the process of local rank {rank} ended with code {child.returncode}"
        return None

    _watch(failed, children, period)


def replace_launcher_watch() -> None:
    """Make Lightning's launcher use :func:`watch_children`; its own watch kills ranks without a message."""
    setattr(subprocess_script, "_launch_process_observer", watch_children)  # noqa: B010 (mypy)


def _watch(ended: Callable[[], str | None], children: list[Popen[bytes]], period: float) -> None:
    def run() -> None:
        while (what := ended()) is None:
            time.sleep(period)
        if (number := stopping.received()) is not None:
            time.sleep(GRACE)  # it ends by itself, unless it waits for what has ended already
            os._exit(128 + number)
        print(LOST.format(what=what), file=sys.stderr, flush=True)
        for child in children:
            child.send_signal(signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=run, name="watch", daemon=True).start()
