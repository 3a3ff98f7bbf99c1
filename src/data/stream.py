"""The batches of one rank, which do not depend on the number of workers and can be resumed after any of them.

A corpus is divided into ``world x LANES`` shares. A rank has ``LANES`` lanes, one for each of its shares, and
takes a batch from each lane in turn. A worker serves some of the lanes, so the number of workers changes no
batch. The shares stay the same when a run is resumed on another number of ranks; each rank then has more
lanes, or fewer (:mod:`src.data.redistribute`).

A lane works in blocks. It reads and encodes documents, then shuffles them and plans their batches with a
generator seeded by (seed, epoch, share, block). So its state is small: the positions of its sources at the
start of the block, and the number of batches yielded from the block. The position of a rank consists of the
states of its lanes.

The next block is encoded in small pieces between the batches of the current one, so no step waits long.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice

from torch.utils.data import IterableDataset, get_worker_info

from src.data.batches import Batch, Batching
from src.data.encode import Encoder, TokenRow
from src.data.reader import Corpora, Reader, State
from src.data.statistics import Statistics
from src.errors import ConfigError

LANES = 4
"""Lanes of a rank when a run starts, and so the most workers that can serve it."""

_CHUNK = 64  # documents encoded at once


@dataclass(frozen=True)
class Recipe:
    """Holds all settings that decide the batches of a stream.

    Args:
        corpora: what is read, and how rows become documents.
        encoder: how documents become token rows.
        batching: how token rows become batches.
        buffer: documents shuffled together, over all lanes of a rank.
        shuffle: whether documents are shuffled at all.
        seed: seed of the order.
    """

    corpora: Corpora
    encoder: Encoder
    batching: Batching
    buffer: int
    shuffle: bool
    seed: int


Item = tuple[Batch | None, State, Statistics]
"""A batch, the state of its lane after it, and its statistics; no batch once the lane has ended."""


class Lane:
    """Yields the batches of one share of the corpus, in one epoch, each as an :data:`Item`.

    After the last batch it yields items without a batch, for ever.

    Args:
        recipe: what the batches are made of.
        epoch: number of the epoch; the order depends on it.
        share: number of the share, from 0.
        shares: into how many disjoint shares the corpus is dealt.
        state: state of the lane after its last batch, to go on from there; None begins at the start.
    """

    def __init__(self, recipe: Recipe, epoch: int, share: int, shares: int, state: State | None) -> None:
        self.recipe, self.epoch, self.share, self.shares = recipe, epoch, share, shares
        self.state = state or {"block": 0, "given": 0, "sources": None}

    def __iter__(self) -> Iterator[Item]:
        """Yield the batches, then for ever the item of an ended lane."""
        recipe, state = self.recipe, self.state
        reader = Reader(recipe.corpora, self.share, self.shares, state["sources"])
        block, dropped = self._block(reader, state["block"]).finish(), list[str]()
        while block.read:
            rng = random.Random(f"{recipe.seed} {self.epoch} {self.share} {state['block']}")
            plan = recipe.batching.plan(block.rows, rng if recipe.shuffle else None)
            dropped += block.dropped
            after = {"block": state["block"] + 1, "given": 0, "sources": reader.states()}
            following = self._block(reader, after["block"])
            pace = -(-max(block.read, following.size) // (_CHUNK * max(1, len(plan))))
            for n, rows in enumerate(plan[state["given"] :], start=state["given"] + 1):
                batch = recipe.batching.collate(rows)
                counts = Statistics.of(rows, batch, dropped if n == 1 else [], block.unread)
                dropped = []
                yield batch, after if n == len(plan) else {**state, "given": n}, counts
                following.advance(pace)
            state, block = after, following.finish()
        yield None, state, Statistics.of([], None, dropped)
        while True:
            yield None, state, Statistics()

    def _block(self, reader: Reader, index: int) -> _Block:
        """Return block ``index``, not read yet; the first ones are small, so that a batch comes soon."""
        rows = self.recipe.batching.batch_size
        size = rows * min(max(1, self.recipe.buffer // (LANES * rows)), 2 << min(index, 30))
        return _Block(reader, self.recipe.encoder, size, self.recipe.batching.block_tokens)


class _Block:
    """Documents read and encoded together: at least ``size``, with at least ``tokens`` tokens."""

    def __init__(self, reader: Reader, encoder: Encoder, size: int, tokens: int) -> None:
        self.reader, self.encoder, self.size, self.tokens = reader, encoder, size, tokens
        self.read = 0
        self.length = 0  # tokens of the rows so far
        self.rows: list[TokenRow] = []
        self.dropped: list[str] = []
        self.unread = set[str]()
        self.ended = False

    def advance(self, chunks: int) -> None:
        """Read and encode ``chunks`` times up to ``_CHUNK`` documents, or until the block is complete."""
        for _ in range(chunks):
            if self.ended or (self.read >= self.size and self.length >= self.tokens):
                return
            wanted = min(_CHUNK, self.size - self.read) if self.read < self.size else _CHUNK
            documents = list(islice(self.reader, wanted))
            self.ended = len(documents) < wanted
            self.read += len(documents)
            for document, rows in zip(documents, self.encoder(documents), strict=True):
                self.rows += rows
                self.length += sum(len(row.ids) for row in rows)
                self.dropped += [] if rows else [document.where]
                self.unread.update(document.unread)

    def finish(self) -> _Block:
        """Read and encode what the block still lacks, and return it."""
        while not (self.ended or (self.read >= self.size and self.length >= self.tokens)):
            self.advance(1)
        return self


class Lanes(IterableDataset[Item | ConfigError]):
    """Yields an :data:`Item` of each lane of a rank in turn, without end; a worker process serves some lanes.

    A fault of a file or row is yielded, not raised.

    Args:
        recipe: what the batches are made of.
        position: position of the rank: its epoch, and the states of its lanes.
        rank: number of the rank, from 0.
        world: number of ranks.
    """

    def __init__(self, recipe: Recipe, position: State, rank: int, world: int) -> None:
        self.recipe, self.position, self.rank, self.world = recipe, position, rank, world

    def __iter__(self) -> Iterator[Item | ConfigError]:
        """Yield items without end; a user's fault is an item, as a worker would garble its message."""
        worker = get_worker_info()
        offset, step = (worker.id, worker.num_workers) if worker else (0, 1)
        position, lanes = self.position, list[Iterator[Item]]()
        count = len(position["lanes"])
        for turn in range(position["turn"] + offset, position["turn"] + count, step):
            share, state = turn % count * self.world + self.rank, position["lanes"][turn % count]
            lane = Lane(self.recipe, position["epoch"], share, self.world * count, state)
            lanes.append(iter(lane))
        try:
            for items in cycle(lanes):
                yield next(items)
        except ConfigError as e:
            while True:
                yield e
