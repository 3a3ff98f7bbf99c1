"""Turn rows of a cache into Parquet bytes, and back.

A row is a document: its tokens, which of them are supervised, and one signal for each position that predicts
a supervised token, in order. Tokens and signal lie in one row, so nothing can be misaligned, and any Parquet
reader (``datasets.load_dataset`` among them) can open a shard.

Log-probabilities, which are at most 0, are stored in one of three precisions: ``float32``; ``float16``; or
``compact``, one byte ``c = round(CODE * sqrt(-log p))``, whose steps grow from 0 to 0.15 nats as p falls from
1 to 2e-9. Entropy and rest take two bytes (four in ``float32``).

Encodings were chosen by measurement (docs/teacher_cache.md): byte-stream split and zstd on values interleaved
as ``[positions * k]`` beat plain, delta, dictionary and one column for each place in the top k.

Shapes: D documents, S tokens of all of them, N positions of all of them, K tokens kept.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from src.cache import fingerprint
from src.data.encode import IGNORE
from src.losses.signals import TopK

Precision = Literal["float32", "float16", "compact"]
CODE = 57.0
Array = NDArray[Any]


@dataclass(frozen=True)
class Rows:
    """Holds documents with their signal, laid end to end.

    Attributes:
        tokens: ``[S]`` int32, tokens of all documents.
        supervised: ``[S]`` bool, whether the token has a label.
        lengths: ``[D]`` number of tokens of each document.
        counts: ``[D]`` number of supervised positions of each document.
        ids: ``[N, K]`` int32, the teacher's likeliest tokens at each position.
        log_probs: ``[N, K]`` float32, their log-probabilities.
        entropy: ``[N]`` float32, entropy of the teacher's whole distribution, nats.
        log_rest: ``[N]`` float32, logarithm of the mass outside the K tokens.
    """

    tokens: Array
    supervised: Array
    lengths: Array
    counts: Array
    ids: Array
    log_probs: Array
    entropy: Array
    log_rest: Array

    @classmethod
    def concatenate(cls, parts: list[Rows]) -> Rows:
        """Return the documents of all parts, laid end to end in their order."""
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)))

    @property
    def corpus(self) -> str:
        """Fingerprint of the documents' tokens, their labels and their order."""
        return fingerprint.documents(self.tokens, self.supervised, self.lengths)


def documents(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the documents of a padded or packed batch, laid end to end as in :class:`Rows`.

    A document without a supervised position is left out: it teaches nothing, and has no signal.

    Returns:
        ``tokens [S]``; ``supervised [S]``, whether a token has a label; ``lengths [D]``, tokens of each
        document; ``counts [D]``, supervised tokens of each document.
    """
    labels = batch["labels"]
    starts = torch.zeros_like(labels, dtype=torch.bool)
    starts[:, 0] = True
    if "position_ids" in batch:
        starts |= batch["position_ids"] == 0
    real = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(starts)
    owner = (starts.flatten().cumsum(0) - 1)[real.flatten()]
    begins = torch.ones_like(owner, dtype=torch.bool)
    begins[1:] = owner[1:] != owner[:-1]
    supervised = (labels != IGNORE)[real] & ~begins  # nothing predicts the first token
    size = int(starts.sum())
    lengths, counts = torch.bincount(owner, minlength=size), torch.bincount(owner[supervised], minlength=size)
    keep = counts > 0
    return (
        batch["input_ids"][real][keep[owner]],
        supervised[keep[owner]],
        lengths[keep],
        counts[keep],
    )


def rows_of(batch: dict[str, Tensor], signal: TopK | None) -> Rows:
    """Return the documents of a batch as rows.

    Args:
        batch: a padded or packed batch.
        signal: the teacher's signal at its N supervised positions, in order; None gives rows without a
            signal (K = 0), as when only their tokens are compared with a shard.
    """
    tokens, supervised, lengths, counts = (x.cpu().numpy() for x in documents(batch))
    corpus = tokens.astype(np.int32), supervised, lengths, counts
    if signal is None:
        none = np.zeros(counts.sum(), np.float32)
        return Rows(*corpus, np.zeros((len(none), 0), np.int32), none[:, None][:, :0], none, none)
    assert counts.sum() == len(signal.entropy), "one signal for each supervised position"
    said = (signal.log_probs, signal.entropy, signal.log_rest)
    return Rows(*corpus, signal.ids.int().cpu().numpy(), *(x.float().cpu().numpy() for x in said))


def encode(rows: Rows, precision: Precision) -> bytes:
    """Return rows as the bytes of a Parquet file; the same rows give the same bytes."""
    real = np.float32 if precision == "float32" else np.float16
    per_signal, k = rows.counts, rows.ids.shape[1]
    if precision == "compact":
        log_probs = np.round(CODE * np.sqrt(-rows.log_probs)).clip(0, 255).astype(np.uint8)
    else:
        log_probs = rows.log_probs.astype(real)
    columns = {
        "input_ids": (rows.tokens, rows.lengths),
        "supervised": (rows.supervised, rows.lengths),
        "teacher_ids": (rows.ids.reshape(-1), per_signal * k),
        "teacher_log_probs": (log_probs.reshape(-1), per_signal * k),
        "teacher_entropy": (rows.entropy.astype(real), per_signal),
        "teacher_log_rest": (rows.log_rest.astype(real), per_signal),
    }
    table = pa.table({name: _lists(*column) for name, column in columns.items()})
    split = [name for name, (values, _) in columns.items() if values.dtype.itemsize > 1]
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
        store_schema=False,
        column_encoding={f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in split},
    )
    return sink.getvalue()


def decode(data: bytes, k: int) -> Rows:
    """Return the rows that :func:`encode` wrote, with ``k`` tokens at each position."""
    table = pq.read_table(pa.BufferReader(data), use_threads=False).combine_chunks()

    def column(name: str) -> tuple[Array, Array]:
        lists = table[name].chunk(0)
        return lists.flatten().to_numpy(zero_copy_only=False), np.diff(lists.offsets.to_numpy())

    tokens, lengths = column("input_ids")
    log_probs = column("teacher_log_probs")[0]
    if log_probs.dtype == np.uint8:
        log_probs = -((log_probs.astype(np.float32) / CODE) ** 2)
    entropy, counts = column("teacher_entropy")
    return Rows(
        tokens,
        column("supervised")[0],
        lengths,
        counts,
        column("teacher_ids")[0].reshape(-1, k),
        log_probs.astype(np.float32).reshape(-1, k),
        entropy.astype(np.float32),
        column("teacher_log_rest")[0].astype(np.float32),
    )


def _lists(values: Array, lengths: Array) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
