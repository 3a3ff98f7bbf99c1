"""Forecast the size and the time of a cache before it is written."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Protocol, cast

import torch
from lightning import Trainer

from src.cache.manifest import Manifest
from src.cache.shards import Rows, documents, encode
from src.data.batches import Batch

TRIAL = 3
"""Batches that are run to measure speed and size."""


class Runner(Protocol):
    """What a forecast asks of the module that runs the teacher."""

    skip: int
    """Number of first batches whose signal is in the cache already."""

    @property
    def device(self) -> torch.device:
        """The device that the teacher runs on."""

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return a batch on that device."""


def forecast(trainer: Trainer, teacher: Runner, manifest: Manifest, count_seconds: float) -> str:
    """Return a message that says how large a cache will be, and how long writing it will take.

    A few batches are run to measure bytes and speed. Then batches are read, but not run, to count the corpus.

    Args:
        trainer: the trainer, about to predict.
        teacher: the teacher, on its device.
        manifest: what is written already.
        count_seconds: seconds after which the counting ends; the message then says "at least". With several
            ranks nothing is counted, because each of their loaders waits for the others at every batch.
    """
    batches: Iterator[Batch] = iter(trainer.predict_dataloaders or ())
    rows, seconds = _trial(trainer, teacher, islice(batches, TRIAL))
    if rows is None:
        return "cache: the corpus is empty."
    size, rate = len(encode(rows, manifest.precision)) / len(rows.entropy), len(rows.tokens) / seconds
    positions, tokens, ended = len(rows.entropy), len(rows.tokens), False
    deadline = time.monotonic() + count_seconds
    while trainer.world_size == 1 and time.monotonic() < deadline and not ended:
        batch = next(batches, None)
        ended = batch is None
        if batch is not None:
            _, _, lengths, counts = documents(batch)
            positions, tokens = positions + int(counts.sum()), tokens + int(lengths.sum())
    done = sum(shard.tokens for shard in manifest.shards)
    return (
        f"cache: {'' if ended else 'at least '}{tokens:,} tokens, {positions:,} supervised: about "
        f"{positions * size / 1e6:,.1f} MB ({size:.0f} bytes each) and "
        f"{max(0, tokens - done) / rate / 60:,.1f} min ({rate:,.0f} tokens/s); "
        f"{done:,} tokens are there already. A million tokens: {1e6 / rate / 60:,.1f} min."
    )


def _trial(trainer: Trainer, teacher: Runner, batches: Iterable[Any]) -> tuple[Rows | None, float]:
    """Return the rows of a few batches, and the seconds they took; the first is run before, as a warm-up."""
    rows, seconds = list[Rows](), 0.0
    for batch in batches:
        batch = teacher.transfer_batch_to_device(batch, teacher.device, 0)
        with torch.no_grad():
            if not rows:
                trainer.strategy.predict_step(batch, teacher.skip)
            began = time.perf_counter()
            rows.append(cast(Rows, trainer.strategy.predict_step(batch, teacher.skip)))
            seconds += time.perf_counter() - began
    return (Rows.concatenate(rows) if rows else None), seconds
