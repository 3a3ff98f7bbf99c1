"""The rows a judgement is made on: encoded as in training, but whole and in their own order."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from src.data.batches import Batch, Padded
from src.data.columns import Columns
from src.data.documents import read_document
from src.data.encode import IGNORE, Encoder, TokenRow
from src.data.sources import WHERE, Source, open_source

Rows = Sequence[dict[str, Any]]


def read_rows(path: str, limit: int | None = None) -> Rows:
    """The first ``limit`` rows of a file, a Hub id or a saved dataset.

    Raises:
        ConfigError: there is no such source, or a row cannot be read.
    """
    return list(islice(open_source(Source(path), 0, 1), limit))


def encode(
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    columns: Columns,
    supervise: Literal["all", "answer"] = "answer",
    max_length: int = sys.maxsize,
) -> list[TokenRow]:
    """Tokens and labels of every row that has a supervised token within ``max_length``.

    Raises:
        ConfigError: a row lacks a column; names the row and what it has.
    """
    eos = tokenizer.eos_token_id is not None
    encoder = Encoder(tokenizer, max_length, supervise, "truncate", None, eos)
    named = ({WHERE: f"row {number}", **row} for number, row in enumerate(rows, 1))
    documents = [read_document(row, columns, "\n", tokenizer) for row in named]
    return [piece for pieces in encoder(documents) for piece in pieces]


def prompt(row: TokenRow) -> list[int]:
    """The tokens before the first supervised one."""
    first = next(at for at, label in enumerate(row.labels) if label != IGNORE)
    return row.ids[:first]


def batches(rows: list[TokenRow], batch_size: int, pad: int) -> Iterator[Batch]:
    """Right-padded batches of rows of similar length."""
    padded = Padded(batch_size, sys.maxsize, pad)
    return map(padded.collate, padded.plan(rows, None))
