"""Encode the rows that models are judged on: as in training, but each once and in their own order."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from src.data.batches import Batch, Padded
from src.data.columns import Columns
from src.data.documents import read_document
from src.data.encode import IGNORE, Encoder, TokenRow
from src.data.formats import WHERE
from src.data.rendering import Rendering
from src.data.sources import Source, open_source

Rows = Sequence[dict[str, Any]]


def read_rows(path: str, limit: int | None = None, split: str | None = None) -> Rows:
    """Return the first ``limit`` rows of a file, a Hub id or a saved dataset, each with its ``WHERE``.

    Args:
        path: what to read.
        limit: rows, at most.
        split: split of a Hub or saved dataset; None is the only one that it has.

    Raises:
        ConfigError: there is no such source, it has several splits, or a row cannot be read.
    """
    rows = islice(open_source(Source(path, split=split), 0, 1), limit)
    return [{WHERE: f"{path} row {number}", **row} for number, row in enumerate(rows, 1)]


def content(rows: Rows) -> str:
    """Return a digest of what rows hold; the same rows have the same, wherever they lie."""
    values = [sorted((name, value) for name, value in row.items() if name != WHERE) for row in rows]
    return hashlib.sha256(repr(values).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Judged:
    """Holds the tokens of the rows to judge, and counts of the rows that are left out.

    Attributes:
        rows: tokens and labels of the rows that have a supervised token.
        numbers: place of each of them among all rows that were read, from 0.
        read: number of rows that were read.
        left_out: number of rows that are not judged, by reason.
        truncated: number of judged rows that are longer than ``max_length`` and lost their end.
        unread: columns that are not read.
    """

    rows: list[TokenRow]
    numbers: list[int]
    read: int
    left_out: dict[str, int]
    truncated: int
    unread: list[str]

    def __str__(self) -> str:
        reasons = "".join(f"; left out: {count} {reason}" for reason, count in self.left_out.items())
        truncated = f"; truncated: {self.truncated} longer than the maximal length" if self.truncated else ""
        unread = f"; columns not read: {', '.join(self.unread)}" if self.unread else ""
        of = f" of {self.read}" if len(self.rows) < self.read else ""
        return f"{len(self.rows)}{of} rows{reasons}{truncated}{unread}"

    @property
    def record(self) -> dict[str, Any]:
        """The counts as plain values."""
        counts = {"rows": len(self.rows), "rows_read": self.read, "left_out": self.left_out}
        return {**counts, "truncated": self.truncated, "columns_not_read": self.unread}


def judged(
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    columns: Columns,
    supervise: Literal["all", "answer"] = "answer",
    max_length: int = sys.maxsize,
) -> Judged:
    """Encode rows; leave out, and count, those without a supervised token within ``max_length``.

    Args:
        tokenizer: tokenizer of the models.
        rows: the rows, by column, as from :func:`read_rows`.
        columns: which columns are read.
        supervise: tokens that count: of the ``answer``, or ``all``.
        max_length: tokens of a row, at most; what is longer loses its end.

    Raises:
        ConfigError: a row lacks a column, or has one that conditions the answer and is not read; names the
            row and what it has.
    """
    eos = tokenizer.eos_token_id is not None
    encoder = Encoder(tokenizer, max_length, supervise, "truncate", None, eos)
    whole = Encoder(tokenizer, sys.maxsize, supervise, "truncate", None, eos)
    named = ({WHERE: f"row {number}", **row} for number, row in enumerate(rows, 1))
    rendering = Rendering(tokenizer)  # of one day, past midnight too
    documents = [read_document(row, columns, "\n", rendering) for row in named]
    kept = [(number, piece) for number, pieces in enumerate(encoder(documents)) for piece in pieces]
    lost = [documents[number] for number in sorted({*range(len(documents))} - {number for number, _ in kept})]
    long = sum(bool(pieces) for pieces in whole(lost))
    reasons = {"whose prompt fills the maximal length": long, "with nothing to judge": len(lost) - long}
    return Judged(
        [piece for _, piece in kept],
        [number for number, _ in kept],
        len(documents),
        {reason: count for reason, count in reasons.items() if count},
        sum(bool(piece.lost) for _, piece in kept),
        sorted({name for document in documents for name in document.unread}),
    )


def prompt(row: TokenRow) -> list[int]:
    """Return the tokens of a row before the first supervised one."""
    first = next(at for at, label in enumerate(row.labels) if label != IGNORE)
    return row.ids[:first]


def by_length(rows: list[TokenRow]) -> list[int]:
    """Return the places of rows from the shortest to the longest, those of one length as they stand."""
    return sorted(range(len(rows)), key=lambda place: len(rows[place].ids))


def batches(rows: list[TokenRow], batch_size: int, pad: int) -> Iterator[Batch]:
    """Yield batches of rows of similar length, padded on the right by the token ``pad``.

    They come in the order of :func:`by_length`.
    """
    padded = Padded(batch_size, sys.maxsize, pad)
    return map(padded.collate, padded.plan(rows, None))
