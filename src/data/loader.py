"""The loader of one rank, whose saved position is that of the last batch handed to training.

Workers read ahead, and so does Lightning: without a length it fetches a batch early, to know the
last one. A loader that saved how far it has *read* would lose those batches at a resume. Here each
batch is queued with the position after it, and :meth:`Loader.handed` moves the position when the
batch is really used.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from math import gcd
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from src.data.batches import Batch, real_tokens
from src.data.reader import State
from src.data.statistics import Statistics
from src.data.stream import LANES, Lanes, Recipe
from src.errors import ConfigError

REPEATED = "repeated"
"""Key that marks a batch which its rank gives a second time, because it has run out before other ranks."""
Agree = Callable[[bool, int], tuple[bool, int]]
"""Function that a rank calls for each batch, with whether it has another one and the tokens of this one. It
returns whether any rank has another one, and the tokens of all ranks."""


def alone(more: bool, tokens: int) -> tuple[bool, int]:
    """Agree with oneself: the :data:`Agree` of a run of one rank, which returns what it is given.

    Args:
        more: whether this rank has another batch.
        tokens: tokens of its present batch.
    """
    return more, tokens


def across_ranks() -> Agree:
    """Return the function by which several ranks agree, batch by batch, whether an epoch goes on.

    All ranks must call this, and then what it returns (:data:`Agree`) once for each batch; that sums two
    numbers over the ranks, on the CPU.
    """
    group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")

    def agree(more: bool, tokens: int) -> tuple[bool, int]:
        counts = torch.tensor([int(more), tokens])
        dist.all_reduce(counts, group=group)
        return bool(counts[0]), int(counts[1])

    return agree


def start() -> State:
    """Return the position before the first batch of the first epoch."""
    counts = asdict(Statistics())
    return {"epoch": 0, **_epoch(LANES), "tokens": 0, "finished": False, "statistics": counts}


def _epoch(lanes: int) -> State:
    """Return the part of a position that is the place in an epoch, at the epoch's start."""
    return {"turn": 0, "lanes": [None] * lanes}


class Loader:
    """Iterates over the batches of an epoch, from ``position`` on.

    Only :meth:`handed` moves the position: without it, every iteration gives the same batches.
    All ranks give the same number of batches: one that runs out early gives its first batch again,
    which the statistics count as ``repeated``.

    Args:
        recipe: what the batches are made of.
        rank: number of this rank, from 0.
        world: number of ranks.
        workers: worker processes; 0 reads in this process. Fewer are used if they do not divide the rank's
            lanes (:mod:`src.data.stream`).
        max_tokens: tokens, over all ranks and epochs, after which there are no more batches.
        agree: function by which ranks agree whether the epoch goes on: :func:`alone`, or the one that
            :func:`across_ranks` returns.
        position: where to start: an earlier :attr:`position`; None is the beginning.
        mark: whether a batch that is given again has the key ``repeated``.

    Raises:
        ConfigError: on iteration, if no document is found, or a file or row is at fault.
    """

    def __init__(
        self,
        recipe: Recipe,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        max_tokens: int | None = None,
        agree: Agree = alone,
        position: State | None = None,
        mark: bool = False,
    ) -> None:
        self.mark = mark
        self.recipe, self.rank, self.world, self.workers = recipe, rank, world, workers
        self.max_tokens, self.agree = max_tokens, agree
        self.position = start() if position is None else position
        self._began = self._waited = 0.0
        self._queue = deque[State]()

    def handed(self) -> None:
        """Move the position past the oldest queued batch, because training has it now."""
        self.position = self._queue.popleft()

    def wait(self) -> float:
        """Share of the time since the first batch that was spent waiting for batches."""
        return self._waited / (time.perf_counter() - self._began) if self._began else 0.0

    @property
    def statistics(self) -> Statistics:
        """The counts over all batches handed to training."""
        return Statistics(**self.position["statistics"])

    def __iter__(self) -> Iterator[Batch]:
        self._queue.clear()
        if self.position["finished"]:
            return
        items = self._items(self.position, self.workers)
        tokens, repeated = self.position["tokens"], self.position["statistics"]["repeated"]
        batch, position = self._next(items)
        more, finished = self.agree(batch is not None, 0)[0], False
        if not more:
            raise ConfigError(_nothing(position["statistics"]))
        while more and not finished:
            if batch is None:
                batch, repeated = self._first(), repeated + 1
            this, here = batch, position
            batch, position = self._next(items)
            more, total = self.agree(batch is not None, real_tokens(this))
            tokens += total
            finished = self.max_tokens is not None and tokens >= self.max_tokens
            if not more:
                here = {**position, "epoch": position["epoch"] + 1, **_epoch(len(position["lanes"]))}
            counts = {**here["statistics"], "repeated": repeated}
            self._queue.append({**here, "tokens": tokens, "finished": finished, "statistics": counts})
            yield this

    def _next(self, items: Iterator[tuple[Batch | None, State]]) -> tuple[Batch | None, State]:
        began = time.perf_counter()
        item = next(items)
        now = time.perf_counter()
        if self._began:
            self._waited += now - began
        else:
            self._began = now  # the first batch is start-up, not waiting
        return item

    def _items(self, position: State, workers: int) -> Iterator[tuple[Batch | None, State]]:
        """Yield batches with the position after each; then, without end, None with the last position."""
        if workers:  # a fork keeps no threads: with them a tokenizer would wait for ever
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        lanes, ended = list(position["lanes"]), set[int]()
        count, workers = len(lanes), gcd(workers, len(lanes)) if workers else 0
        counts = Statistics(**position["statistics"])
        data = DataLoader(
            Lanes(self.recipe, position, self.rank, self.world),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            collate_fn=_as_is,
            generator=torch.Generator(),  # leaves the global generator alone
        )
        for turn, item in enumerate(data, start=position["turn"]):
            if isinstance(item, ConfigError):
                raise item
            batch, lanes[turn % count], more = item
            counts += more
            here = {
                **position,
                "turn": (turn + 1) % count,
                "lanes": list(lanes),
                "statistics": asdict(counts),
            }
            if batch is not None:
                yield batch, here
            else:
                ended.add(turn % count)
                if len(ended) == count:
                    break
        del data
        while True:
            yield None, here

    def _first(self) -> Batch:
        """Return the first batch of the epoch, for a rank that has run out of its own."""
        batch, _ = next(self._items({**self.position, **_epoch(len(self.position["lanes"]))}, workers=0))
        if batch is None:
            raise ConfigError(
                f"data: rank {self.rank} of {self.world} found no document; the corpus is too "
                "small for so many ranks. Use fewer devices or more documents."
            )
        return {**batch, REPEATED: torch.ones(1)} if self.mark else batch


def _nothing(counts: dict[str, Any]) -> str:
    dropped = f"{counts['dropped']} were left out, the first at {counts['first_dropped']}"
    why = dropped if counts["dropped"] else "there are none on this side of data.held_out"
    return (
        f"data: no document has a token to learn from: {why}. A document needs at least two "
        "tokens, one of them supervised within data.max_length; see data.supervise."
    )


def _as_is(item: Any) -> Any:
    return item
