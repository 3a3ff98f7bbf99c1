"""Count documents, tokens and padding of the batches, and whatever is left out of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from src.data.batches import Batch, real_tokens
from src.data.encode import IGNORE, TokenRow


@dataclass(frozen=True)
class Statistics:
    """Holds counts over batches; the sum of two holds the counts over the batches of both.

    Args:
        batches: batches given.
        documents: documents in them; each piece of a split document counts.
        tokens: tokens that are not padding.
        supervised: tokens with a label.
        padding: tokens of padding.
        truncated: documents truncated at ``max_length``.
        lost: tokens that truncation took.
        dropped: documents left out because no token of theirs would be supervised.
        repeated: batches given a second time by a rank that ran out before the others.
        first_truncated: file and row of the first truncated document.
        first_dropped: file and row of the first document left out.
        unread: columns of the documents that are not read, sorted.
    """

    batches: int = 0
    documents: int = 0
    tokens: int = 0
    supervised: int = 0
    padding: int = 0
    truncated: int = 0
    lost: int = 0
    dropped: int = 0
    repeated: int = 0
    first_truncated: str = ""
    first_dropped: str = ""
    unread: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, rows: list[list[TokenRow]], batch: Batch | None, dropped: list[str], unread: Iterable[str] = ()
    ) -> Statistics:
        """Return the counts over one batch.

        Args:
            rows: for each row of the batch, the documents (or pieces) that it holds; empty if ``batch`` is
                None.
            batch: the collated batch; None at the end of the data, to count the last documents left out.
            dropped: file and row of each document left out since the batch before.
            unread: columns of the documents that are not read.
        """
        documents = [document for row in rows for document in row]
        truncated = [document for document in documents if document.lost]
        tokens = 0 if batch is None else real_tokens(batch)
        return cls(
            batches=int(batch is not None),
            documents=len(documents),
            tokens=tokens,
            supervised=0 if batch is None else int((batch["labels"] != IGNORE).sum()),
            padding=0 if batch is None else batch["input_ids"].numel() - tokens,
            truncated=len(truncated),
            lost=sum(document.lost for document in truncated),
            dropped=len(dropped),
            first_truncated=truncated[0].where if truncated else "",
            first_dropped=dropped[0] if dropped else "",
            unread=tuple(sorted(unread)),
        )

    def __add__(self, other: Statistics) -> Statistics:
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return Statistics(*(_sum(a, b) for a, b in pairs))

    def numbers(self) -> dict[str, float]:
        """Return the counts by name, and the share of padding as ``waste``."""
        numbers = {k: float(v) for k, v in asdict(self).items() if isinstance(v, int)}
        return {**numbers, "waste": self.padding / max(1, self.tokens + self.padding)}

    def fates(self) -> set[str]:
        """Return warnings of what was not used as it is, each a sentence that names the first case.

        They are of documents truncated or left out, of repeated batches, and of columns that are not read.
        """
        truncated = {f"{self.first_truncated} exceeds data.max_length and was truncated (data/truncated)"}
        dropped = {f"{self.first_dropped} has no token to learn from and was left out (data/dropped)"}
        short = {
            "a rank has fewer documents than the others and is given its first batch again until they end "
            "(data/repeated); files of similar size, or one file, are dealt out evenly"
        }
        columns = {f"not read are the columns {', '.join(self.unread)} (data.columns names those that are)"}
        return (
            (columns if self.unread else set())
            | (truncated if self.truncated else set())
            | (dropped if self.dropped else set())
            | (short if self.repeated else set())
        )


def _sum(a: Any, b: Any) -> Any:
    """Add counts, keep the first of two places, unite names."""
    if isinstance(a, int):
        return a + b
    return a or b if isinstance(a, str) else tuple(sorted({*a, *b}))
