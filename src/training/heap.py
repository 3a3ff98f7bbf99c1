"""The memory of this process: its peak, and what it gives back to the machine.

On a CPU, rows differ in length, and so do a step's tensors. The allocator of glibc keeps the holes that
they leave, and a process grows by half in the course of a run.
"""

from __future__ import annotations

import ctypes
import resource
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

EVERY = 10
"""Steps between two calls: what is given back has to be cleared by the kernel when it is taken again."""


class Trimmed(Callback):
    """Trims the heap every :data:`EVERY` steps of a run on a CPU; no tensor changes.

    Where the C library cannot do it (macOS, Windows, musl), nothing is done.
    """

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if module.device.type == "cpu" and batch_idx % EVERY == 0:
            trim()


def trim() -> bool:
    """Give free pages of the heap back; return whether any were."""
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (AttributeError, OSError, TypeError):
        return False


def peak(device: torch.device) -> int:
    """Return the most bytes that this process has held: on a GPU of its tensors, otherwise in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
