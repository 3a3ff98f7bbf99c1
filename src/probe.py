"""Measure masks on fixed calibration rows: to score layers, and to choose among masks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from src.data.batches import real_tokens
from src.errors import ConfigError
from src.losses.distill import supervised
from src.losses.signals import Signal
from src.models.gated import Observer

if TYPE_CHECKING:
    from src.search import MaskSearch


class CalibrationProbe:
    """The first ``calibration_batches`` validation batches, with the teacher's signal kept.

    Results are averaged over ranks, so that all ranks decide alike, and remembered per mask. A quick
    measurement takes the first quarter of the batches: enough to drop bad masks, not to rank good ones.

    Args:
        search: the search whose model is measured; its trainer must be attached.
    """

    def __init__(self, search: MaskSearch) -> None:
        self.search = search
        loader = cast(Any, search.trainer).datamodule.val_dataloader()
        self.rows: list[tuple[dict[str, Tensor], Signal, int]] = []
        for number, batch in enumerate(loader):
            if number == search.calibration_batches:
                break
            batch = search.transfer_batch_to_device(batch, search.device, 0)
            index = supervised(batch["labels"])
            self.rows.append((batch, search.teacher_signal(batch, index), len(index)))
        if not self.rows:
            raise ConfigError(
                "data.validation: a search needs held-out rows to score layers and choose a mask; name a "
                "file, or set data.held_out to a share of the training documents."
            )
        self.tokens = sum(real_tokens(batch) for batch, _, _ in self.rows)
        search.tokens += self.tokens * search.trainer.world_size
        self._known: dict[tuple[bool, tuple[float, ...]], float] = {}

    @torch.no_grad()
    def divergence(self, gates_L: Tensor, quick: bool = False) -> float:
        """Mean divergence (nats per token) of the model under ``gates_L`` from the teacher."""
        key = (quick, tuple(gates_L.tolist()))
        if key not in self._known:
            rows = self.rows[: -(-len(self.rows) // 4)] if quick else self.rows
            gates_L = gates_L.to(self.search.device)
            losses = [self.search.divergence(batch, signal, gates_L) * n for batch, signal, n in rows]
            sums = torch.stack([torch.stack(losses).sum(), losses[0].new_tensor(sum(n for *_, n in rows))])
            total, count = self.search.trainer.strategy.reduce(sums, reduce_op="sum")
            self._known[key] = float(total / count)
        return self._known[key]

    @torch.no_grad()
    def observe(self, observer: Observer) -> None:
        """Run the open model over the rows, showing each layer's input and output."""
        for batch, _, _ in self.rows:
            self.search.hidden(batch, None, observer)
