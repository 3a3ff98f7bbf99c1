"""Make batches of token rows: padded rows of similar length, or packed rows of several documents.

A packed row separates its documents by ``position_ids`` that start again at each, and by having
**no** attention mask: from that, transformers builds a block-diagonal mask of every layer type,
sliding windows included (``masking_utils.find_packed_sequence_indices``; only without a cache,
``use_cache=False``). The first token of each document has no label, so that no document is
predicted from the one before it, and every padding token is a document of its own, at position 0.

Shapes: B rows, T tokens of a row.
"""

from __future__ import annotations

import bisect
import hashlib
import random
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from src.data.encode import IGNORE, TokenRow

Batch = dict[str, Tensor]


def supervised(labels_BT: Tensor, position_ids_BT: Tensor | None = None) -> Tensor:
    """Return the flat index ``[N]`` into ``B * T`` of the positions that predict a supervised token.

    Position t predicts token t + 1, so it counts when the label of t + 1 is not -100; the label itself is
    ``labels.flatten()[index + 1]``. In packed rows the first token of a document is predicted by nobody.
    """
    predicts = torch.zeros_like(labels_BT, dtype=torch.bool)
    predicts[:, :-1] = labels_BT[:, 1:] != IGNORE
    if position_ids_BT is not None:
        predicts[:, :-1] &= position_ids_BT[:, 1:] != 0
    return predicts.flatten().nonzero()[:, 0]


@dataclass(frozen=True)
class Supervised:
    """Holds a batch with its N supervised positions, which are found once for all passes of a step.

    Attributes:
        batch: the rows.
        index_N: the supervised positions, as indices into the flat ``B * T``.
        labels_N: the tokens that these positions predict.
    """

    batch: Batch
    index_N: Tensor
    labels_N: Tensor

    @classmethod
    def of(cls, batch: Batch) -> Supervised:
        """Find the supervised positions of a batch."""
        index_N = supervised(batch["labels"])
        return cls(batch, index_N, batch["labels"].flatten()[index_N + 1])

    def __len__(self) -> int:
        return len(self.index_N)


class Batching(Protocol):
    """Says how documents that are read together, a block, become rows and batches."""

    @property
    def batch_size(self) -> int:
        """Rows of a batch, at most."""

    @property
    def block_tokens(self) -> int:
        """Tokens that a block has at least, so that its batches are well filled; 0 if any number will do."""

    def plan(self, rows: list[TokenRow], rng: random.Random | None) -> list[list[list[TokenRow]]]:
        """Divide the documents ``rows`` into batches: a list of batches of rows of documents.

        Documents and batches are shuffled by ``rng``, or keep a fixed order without one.
        """

    def collate(self, batch: list[list[TokenRow]]) -> Batch:
        """Return the tensors ``[B, T]`` of one of the planned batches."""


@dataclass(frozen=True)
class Padded:
    """Puts one document in a row, and rows of similar length in a batch, so that little is padding."""

    batch_size: int
    max_length: int
    pad_id: int
    block_tokens: int = 0

    def plan(self, rows: list[TokenRow], rng: random.Random | None) -> list[list[list[TokenRow]]]:
        if rng:
            rng.shuffle(rows)
        rows = sorted(rows, key=lambda row: len(row.ids))
        return _divide([[row] for row in rows], self.batch_size, rng)

    def collate(self, batch: list[list[TokenRow]]) -> Batch:
        rows = [row for (row,) in batch]
        lengths_B = torch.tensor([len(row.ids) for row in rows])
        width = int(lengths_B.max())
        return {
            "input_ids": _matrix([row.ids for row in rows], width, self.pad_id),
            "attention_mask": (torch.arange(width) < lengths_B[:, None]).long(),
            "labels": _matrix([row.labels for row in rows], width, IGNORE),
        }


@dataclass(frozen=True)
class Packed:
    """Puts whole documents into rows of exactly ``max_length`` tokens; padding fills what is left."""

    batch_size: int
    max_length: int
    pad_id: int

    @property
    def block_tokens(self) -> int:
        return 4 * self.batch_size * self.max_length

    def plan(self, rows: list[TokenRow], rng: random.Random | None) -> list[list[list[TokenRow]]]:
        packed = pack(rows, self.max_length)
        if rng:
            rng.shuffle(packed)
        return _divide(packed, self.batch_size, rng)

    def collate(self, batch: list[list[TokenRow]]) -> Batch:
        ids = [[i for row in rows for i in row.ids] for rows in batch]
        labels = [[i for row in rows for i in [IGNORE, *row.labels[1:]]] for rows in batch]
        positions = [[i for row in rows for i in range(len(row.ids))] for rows in batch]
        return {
            "input_ids": _matrix(ids, self.max_length, self.pad_id),
            "position_ids": _matrix(positions, self.max_length, 0),
            "labels": _matrix(labels, self.max_length, IGNORE),
        }


def pack(rows: list[TokenRow], size: int) -> list[list[TokenRow]]:
    """Pack documents into bins of ``size`` tokens, and return the bins (best fit, decreasing).

    The longest document comes first, and each goes into the fullest bin that has room.
    """
    bins: list[list[TokenRow]] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        at = bisect.bisect_left(room, (len(row.ids), -1))
        if at == len(room):
            bins.append([])
            free, bin_ = size, len(bins) - 1
        else:
            free, bin_ = room.pop(at)
        bins[bin_].append(row)
        bisect.insort(room, (free - len(row.ids), bin_))
    return bins


def real(batch: Batch) -> Tensor:
    """Return which tokens ``[B, T]`` of a batch are not padding."""
    if "attention_mask" in batch:
        return batch["attention_mask"].bool()
    inside = batch["position_ids"] > 0
    # A document has at least two tokens, so its first is followed by position 1.
    return inside | torch.nn.functional.pad(inside[:, 1:], (0, 1))


def real_tokens(batch: Batch) -> int:
    """Return the number of tokens of a batch that are not padding."""
    return int(real(batch).sum())


def row_ids(batch: Batch) -> list[int]:
    """Return for each row a hash of its tokens alone, the same in every batch, order and corpus.

    The padding of a padded row does not count; that of a packed row does.
    """
    names = []
    for b, ids in enumerate(batch["input_ids"].cpu()):
        kept = ids[batch["attention_mask"][b].cpu().bool()] if "attention_mask" in batch else ids
        names.append(name_of(kept))
    return names


def name_of(ids_T: Tensor) -> int:
    """Return a hash of tokens as a signed 64-bit number, the same on every machine."""
    digest = hashlib.blake2b(ids_T.numpy().astype("<i8").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _divide(rows: list[list[TokenRow]], size: int, rng: random.Random | None) -> list[list[list[TokenRow]]]:
    """Divide rows into the fewest batches of at most ``size`` rows, as equal as can be."""
    count = -(-len(rows) // size)
    ends = [len(rows) * i // count for i in range(count + 1)] if count else [0]
    batches = [rows[a:b] for a, b in pairwise(ends)]
    if rng:
        rng.shuffle(batches)
    return batches


def _matrix(rows: list[list[int]], width: int, fill: int) -> Tensor:
    full = np.array([row + [fill] * (width - len(row)) for row in rows], dtype=np.int64)
    return torch.from_numpy(full)
