"""Count the documents that a run reads, each once however often it is read: the text that the run needs.

A stage that reads the same rows eight times *processes* eight times their tokens but needs their *distinct*
tokens only. Documents are told apart by their tokens. A sample of them is kept, those with the smallest
hashes, from which the number of all follows (bottom-k sketch; Cohen and Kaplan, PODC 2007): exact below
:data:`KEPT` documents, then within about 0.4 %. Samples of several ranks or stages unite to that of all.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from src.data.batches import Batch, name_of, real

KEPT = 1 << 16
"""Most documents that a sample keeps."""

_HALF = 1 << 63


class Distinct:
    """Counts the different documents seen so far, and their tokens."""

    def __init__(self) -> None:
        self._tokens: dict[int, int] = {}

    def add(self, batch: Batch) -> None:
        """Count the documents of a batch. A padded row is one document; a packed row holds several.

        Soft prompts, which have no tokens, are none.
        """
        if "input_ids" not in batch:
            return
        ids_BT, real_BT = batch["input_ids"].cpu(), real(batch).cpu()
        first_BT = torch.zeros_like(real_BT)
        if "position_ids" in batch:
            first_BT = batch["position_ids"].cpu() == 0
        for ids_T, real_T, first_T in zip(ids_BT, real_BT, first_BT, strict=True):
            starts = first_T[real_T].nonzero()[:, 0].tolist()
            for document in ids_T[real_T].tensor_split([start for start in starts if start]):
                self._tokens[name_of(document) + _HALF] = len(document)
        if len(self._tokens) > 2 * KEPT:
            self._thin()

    def _thin(self) -> None:
        self._tokens = dict(sorted(self._tokens.items())[:KEPT])

    @property
    def documents(self) -> int:
        """Number of different documents: exact below :data:`KEPT`, an estimate from there on."""
        if len(self._tokens) < KEPT:
            return len(self._tokens)
        return round((KEPT - 1) * 2 * _HALF / sorted(self._tokens)[KEPT - 1])

    @property
    def tokens(self) -> int:
        """Number of tokens of the different documents, as exact as :attr:`documents`."""
        return round(self.documents * sum(self._tokens.values()) / max(1, len(self._tokens)))

    @property
    def sample(self) -> Tensor:
        """Hash and number of tokens of each of the D kept documents, int64 ``[D, 2]``, for :meth:`unite`."""
        self._thin()
        signed = [(name - _HALF, tokens) for name, tokens in self._tokens.items()]
        return torch.tensor(signed, dtype=torch.int64).reshape(-1, 2)

    def unite(self, samples: Iterable[Tensor]) -> Distinct:
        """Add to this counter, in place, what counters of other ranks or stages have seen, and return it.

        A document that several of them have seen counts once.

        Args:
            samples: their :attr:`sample`, each int64 ``[D, 2]``.
        """
        for sample in samples:
            self._tokens |= {name + _HALF: tokens for name, tokens in sample.tolist()}
        self._thin()
        return self
