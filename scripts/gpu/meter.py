"""What a stage's steps cost: tokens per second after a warm-up, and the peak of the memory."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from scripts.lab.benches import memory
from src.data.batches import real_tokens
from src.files import write_json


class Meter(Callback):
    """Writes steps, tokens, seconds, ``tokens_per_s`` and ``peak_bytes, reserved_bytes, used_bytes`` as JSON.

    Tokens are counted from the end of the ``warmup``-th batch, when kernels are loaded and the optimiser has
    its state. The peak is that of the allocator from the first batch on, and what it reserved to hold it,
    beside all that the device has given away in the end; without a GPU, that of the whole process.

    Args:
        path: the JSON file, written when the batches end.
        warmup: batches that are not timed.
    """

    def __init__(self, path: str, warmup: int = 2) -> None:
        self.path, self.warmup = path, warmup
        self.steps = self.tokens = 0
        self.began = self.ended = 0.0

    def _begin(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if self.steps == 0 and module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _count(self, trainer: Trainer, module: LightningModule, _: Any, batch: Any, *__: Any) -> None:
        self.steps += 1
        if self.steps > self.warmup:
            self.tokens += real_tokens(batch) * trainer.world_size
        if self.steps >= self.warmup:
            if module.device.type == "cuda":
                torch.cuda.synchronize()
            self.ended = time.monotonic()
        if self.steps == self.warmup:
            self.began = self.ended

    def _write(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        cuda = module.device.type == "cuda"
        seconds = self.ended - self.began
        free, total = torch.cuda.mem_get_info() if cuda else (0, 0)
        write_json(self.path, {
            "steps": self.steps, "tokens": self.tokens, "seconds": seconds,
            "tokens_per_s": self.tokens / seconds if seconds else None,
            "peak_bytes": torch.cuda.max_memory_allocated() if cuda else memory("VmHWM"),
            "reserved_bytes": torch.cuda.max_memory_reserved() if cuda else None,
            "used_bytes": total - free if cuda else None,
        })  # fmt: skip

    on_train_batch_start = on_predict_batch_start = _begin  # type: ignore[assignment]
    on_train_batch_end = on_predict_batch_end = _count  # type: ignore[assignment]
    on_train_end = on_predict_end = _write  # type: ignore[assignment]
