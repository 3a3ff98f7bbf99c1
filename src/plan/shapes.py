"""Make batches of the size that a planned run would read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from src.data.batches import Batch


@dataclass(frozen=True)
class Rows:
    """Says how large a rank's batches are: ``count`` rows of ``length`` tokens, padded to it or packed."""

    count: int
    length: int
    packed: bool

    def batch(self) -> Batch:
        """Return a batch as the data module makes them, every row full and every token supervised."""
        ids_BT = torch.ones(self.count, self.length, dtype=torch.long)
        if not self.packed:
            return {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "labels": ids_BT.clone()}
        half = self.length - self.length // 2
        positions = torch.cat([torch.arange(half), torch.arange(self.length - half)])
        return {"input_ids": ids_BT, "position_ids": positions.expand_as(ids_BT), "labels": ids_BT.clone()}

    @property
    def positions(self) -> int:
        """Largest number of supervised positions of a batch; the last token of a row predicts nothing."""
        return self.count * (self.length - 1)
