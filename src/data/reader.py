"""Read one share of a mixture of sources, in the proportions of their weights, from any position on."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from src.data.columns import Columns
from src.data.documents import Document, read_document
from src.data.formats import UNREADABLE, WHERE, Row, reason
from src.data.rendering import Rendering
from src.data.sources import Source, open_source
from src.errors import ConfigError

State = dict[str, Any]
"""A position in the data, as plain numbers, texts, lists and dicts, which a checkpoint may hold."""


@dataclass(frozen=True)
class Corpora:
    """Says what to read, and how its rows become documents.

    Args:
        sources: the sources of the mixture.
        columns: which columns of the rows are read.
        separator: text between prompt and answer.
        rendering: how chats become text.
        held_out: share of the documents that is set apart, in [0, 1). A hash of what a row says before any
            template decides whether its document is one of them.
        apart: whether to read the documents set apart, or the others.
    """

    sources: list[Source]
    columns: Columns
    separator: str
    rendering: Rendering
    held_out: float = 0.0
    apart: bool = False

    def wants(self, document: Document) -> bool:
        """Return whether a document belongs to the side of the held-out split that is read."""
        return (zlib.crc32(document.raw.encode()) < self.held_out * 2**32) == self.apart


class Reader(Iterator[Document]):
    """Yields the documents of one share of a mixture of sources, in the proportions of the sources' weights.

    The next row comes from the source that is furthest behind its weight (D'Hondt's rule). So the proportions
    hold at every moment, without chance, and the state is a count and a position for each source.

    Args:
        corpora: the mixture.
        share: number of the share, from 0.
        shares: into how many disjoint shares the corpus is dealt.
        states: :meth:`states` of an earlier reader, to go on from there; None begins at the start.

    Raises:
        ConfigError: on reading, at the first fault of a file or row; names both.
    """

    def __init__(self, corpora: Corpora, share: int, shares: int, states: list[State] | None = None) -> None:
        self.corpora = corpora
        before = states or [{} for _ in corpora.sources]
        self.parts = [
            _Part(source, share, shares, **state)
            for source, state in zip(corpora.sources, before, strict=True)
        ]

    def __next__(self) -> Document:
        while True:
            part = self._furthest_behind()
            row = part.next()
            if row is None:
                continue
            document = read_document(
                row, self.corpora.columns, self.corpora.separator, self.corpora.rendering
            )
            if self.corpora.wants(document):
                return document

    def states(self) -> list[State]:
        """Return the positions in all sources; a reader that is made with them goes on from here."""
        return [part.state() for part in self.parts]

    def _furthest_behind(self) -> _Part:
        if all(part.ended for part in self.parts):
            raise StopIteration
        return max(
            (part for part in self.parts if part.gives),
            key=lambda part: (part.source.weight or 1.0) / (part.drawn + 1),
        )


class _Part:
    """One source, the reader's position in it, and whether it was read to its end once."""

    def __init__(
        self,
        source: Source,
        share: int,
        shares: int,
        drawn: int = 0,
        ended: bool = False,
        gives: bool = True,
        position: State | None = None,
    ) -> None:
        self.source, self.share, self.shares = source, share, shares
        self.drawn, self.ended, self.gives = drawn, ended, gives
        self._open(position)

    def _open(self, position: State | None) -> None:
        self.position, self.fresh = position, position is None
        self.data = open_source(self.source, self.share, self.shares)
        if position is not None:
            self.data.load_state_dict(copy.deepcopy(position))
        self.rows = self.data.iter(batch_size=1)  # iter(data) would divide the rows again among workers

    def next(self) -> Row | None:
        """Return the next row; None at the end of the source.

        A source with a weight then starts again: the next call returns its first row. One that gave no row
        since its start does not.
        """
        try:
            batch = next(self.rows, None)
        except ConfigError:
            raise
        except UNREADABLE as e:  # of the Hub: files name their own faults
            raise ConfigError(f"{self._where()} cannot be read after row {self.drawn}: {reason(e)}") from e
        if batch is None:
            self.ended, self.gives = True, self.source.weight is not None and not self.fresh
            if self.gives:
                self._open(None)
            return None
        self.fresh, self.drawn = False, self.drawn + 1
        row = {column: values[0] for column, values in batch.items()}
        row.setdefault(WHERE, f"{self._where()} row {self.drawn}")
        return row

    def _where(self) -> str:
        split = f" (split '{self.source.split}')" if self.source.split else ""
        return f"{self.source.path}{split}, share {self.share + 1}/{self.shares},"

    def state(self) -> State:
        position = self.data.state_dict() or self.position  # None until the first row is asked for
        return {"drawn": self.drawn, "ended": self.ended, "gives": self.gives, "position": position}
