"""Load the batches of a cache, in an order that is a function of (seed, epoch) alone.

An epoch takes the shards in a shuffled order. The rows of a shard are divided into batches of similar length,
and ranks take batches in turn. So the position of a run is two numbers: its epoch, and its batches done.

Shapes: B documents of a batch, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from src.cache.manifest import Shard
from src.cache.reader import Cache
from src.cache.shards import Array, Rows
from src.data.batches import Batch
from src.data.encode import IGNORE
from src.errors import ConfigError


class CachedLoader:
    """Iterates over the batches of one rank; in training each iteration is the next epoch.

    It has a length: without one, Lightning would read a batch ahead of the saved position. In training, an
    iteration that was broken off is continued by the next one, so that no document is lost. Lightning breaks
    one off when it resumes at the end of an epoch, and at ``limit_train_batches``.

    Args:
        cache: what to read.
        batch_size: documents of a batch.
        pad_id: token that fills rows.
        seed: seed of the order.
        shuffle: whether to shuffle, and to begin the next epoch with each iteration; otherwise every
            iteration gives the same batches.
        rank: number of this rank, from 0.
        world: number of ranks.
    """

    def __init__(
        self, cache: Cache, batch_size: int, pad_id: int, seed: int, shuffle: bool, rank: int, world: int
    ) -> None:
        self.cache, self.batch_size, self.pad_id = cache, batch_size, pad_id
        self.seed, self.shuffle, self.rank, self.world = seed, shuffle, rank, world
        self.epoch, self.done = 0, 0

    def __len__(self) -> int:
        return sum(self._count(shard) for _, shard in self.cache.shards)

    def _count(self, shard: Shard) -> int:
        return -(-shard.rows // (self.batch_size * self.world))

    def __iter__(self) -> Iterator[Batch]:
        if not self.shuffle:
            self.done = 0
        elif self.done == len(self):
            self.epoch, self.done = self.epoch + 1, 0
        first = self.done
        start = 0
        for index in self._order():
            count = self._count(self.cache.shards[index][1])
            if start + count > first:
                rows = self.cache.read(index)
                plan = self._plan(rows, self._rng(1 + index))
                for number in range(max(first - start, 0), count):
                    self.done = start + number + 1
                    yield collate(rows, plan[(number * self.world + self.rank) % len(plan)], self.pad_id)
            start += count

    def _order(self) -> list[int]:
        """Return the numbers of the shards in the order of the epoch."""
        shards = list(range(len(self.cache.shards)))
        if self.shuffle:
            self._rng(0).shuffle(shards)
        return shards

    def _rng(self, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.epoch, stream])

    def _plan(self, rows: Rows, rng: np.random.Generator) -> list[Array]:
        """Return the numbers of each batch's documents; they are of similar length, the batches shuffled."""
        order = rng.permutation(len(rows.lengths)) if self.shuffle else np.arange(len(rows.lengths))
        order = order[np.argsort(rows.lengths[order], kind="stable")]
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        if self.shuffle:
            rng.shuffle(batches)
        return batches

    @property
    def order(self) -> dict[str, Any]:
        """The settings that a saved position depends on; the number of ranks is none of them."""
        return {"corpus": self.cache.corpus, "batch_size": self.batch_size, "seed": self.seed}

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "done": self.done, "world": self.world, **self.order}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the last batch that was handed out, on any number of ranks.

        Raises:
            ConfigError: the corpus, the batch size or the seed has changed; the message names the keys.
        """
        changed = [
            f"data.init_args.{key} was {state_dict.get(key)} and is now {now}"
            for key, now in self.order.items()
            if state_dict.get(key) != now
        ]
        if changed:
            raise ConfigError(
                f"cache: the checkpoint's place in it has no meaning now: {'; '.join(changed)}. Set them "
                f"back, or start anew without the checkpoint."
            )
        self.epoch = state_dict["epoch"]
        self.done = self._place(state_dict["done"], state_dict["world"])

    def _place(self, done: int, world: int) -> int:
        """Return how many batches this rank has done when each of ``world`` ranks has done ``done``.

        All ranks begin a shard together. Where the number of ranks has changed and the position lies within a
        batch of all ranks, that batch is given again.
        """
        here = 0
        for index in self._order():
            shard = self.cache.shards[index][1]
            others, own = -(-shard.rows // (self.batch_size * world)), self._count(shard)
            if done < others:
                return here + min(done * world // self.world, own)
            done, here = done - others, here + own
        return here


def collate(rows: Rows, chosen: Array, pad_id: int) -> Batch:
    """Return some documents as a padded batch, with the teacher's signal.

    Args:
        rows: rows of a shard.
        chosen: ``[B]`` numbers of the documents.
        pad_id: token that fills rows, on the right.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, each ``[B, T]``; and the signal of the N supervised
        positions in their order: ``teacher_ids`` and ``teacher_log_probs`` ``[N, K]``, ``teacher_entropy``
        and ``teacher_log_rest`` ``[N]``.
    """
    lengths, counts = rows.lengths[chosen], rows.counts[chosen]
    inside = np.arange(lengths.max()) < lengths[:, None]
    tokens_at = _ranges(np.cumsum(rows.lengths)[chosen] - lengths, lengths)
    signal_at = _ranges(np.cumsum(rows.counts)[chosen] - counts, counts)
    ids = np.full(inside.shape, pad_id, np.int64)
    labels = np.full(inside.shape, IGNORE, np.int64)
    ids[inside] = rows.tokens[tokens_at]
    labels[inside] = np.where(rows.supervised[tokens_at], rows.tokens[tokens_at], IGNORE)
    arrays = {
        "input_ids": ids,
        "attention_mask": inside.astype(np.int64),
        "labels": labels,
        "teacher_ids": rows.ids[signal_at].astype(np.int64),
        "teacher_log_probs": rows.log_probs[signal_at],
        "teacher_entropy": rows.entropy[signal_at],
        "teacher_log_rest": rows.log_rest[signal_at],
    }
    return {key: torch.from_numpy(array) for key, array in arrays.items()}


def _ranges(starts: Array, sizes: Array) -> Array:
    """Return the integers of all ranges ``[start, start + size)``, one range after the other."""
    ends = np.cumsum(sizes)
    ranges: Array = np.arange(ends[-1]) + np.repeat(starts - (ends - sizes), sizes)
    return ranges
