"""Measure masks on fixed calibration rows, to score units and to choose among masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, cast

import torch
from lightning import Trainer
from torch import Tensor, nn

from src.data.batches import Batch, Supervised, real, real_tokens
from src.data.distinct import Distinct
from src.errors import ConfigError
from src.losses.distill import Distillation
from src.losses.signals import Signal
from src.models.gated import Gates, Observer
from src.training.data import Data

LABELS = Distillation(alpha=0.0, weight="none")
"""The plain language-model loss."""


class Measured(Protocol):
    """What a probe asks of the module whose model it measures; a search has all of it."""

    tokens: int
    read: Distinct
    calibration_batches: int
    num_layers: int
    gates: Gates

    @property
    def data(self) -> Data:
        """The data module."""

    @property
    def trainer(self) -> Trainer:
        """The attached trainer."""

    @property
    def device(self) -> torch.device:
        """Device of the model."""

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch to a device, as every LightningModule can."""

    def teacher_hidden(self, batch: Batch, observer: Observer | None = None) -> Tensor:
        """Return the teacher's final hidden states: gates open, adapters off."""

    def parents_weights(self) -> AbstractContextManager[None]:
        """Switch the adapters off, if there are any."""

    def spent(self, batch: Batch, layers: float) -> None:
        """Count a pass of a batch through some layers in the budget of the search."""

    def teacher_signal(self, rows: Supervised) -> Signal:
        """Return the teacher's signal on a batch."""

    def divergence(
        self, rows: Supervised, signal: Signal, gates_U: Tensor | None, by: Distillation | None = None
    ) -> Tensor:
        """Return the loss of the model under gates, against the teacher's signal on the same rows."""


class CalibrationProbe:
    """Measures masks on the first ``calibration_batches`` validation batches.

    The teacher's signal on these rows is computed once. Results are means over all ranks, so all ranks decide
    alike, and a mask that was measured before is not measured again. A quick measurement takes the first
    quarter of the batches, which is enough to drop bad masks, but not to rank good ones.

    Args:
        search: the search whose model is measured; its trainer must be attached.
    """

    def __init__(self, search: Measured) -> None:
        self.search = search
        self.rows: list[tuple[Supervised, Signal]] = []
        for number, batch in enumerate(search.data.val_dataloader()):
            if number == search.calibration_batches:
                break
            search.read.add(batch)
            batch = search.transfer_batch_to_device(batch, search.device, 0)
            rows = Supervised.of(batch)
            self.rows.append((rows, search.teacher_signal(rows)))
        if not self.rows:
            raise ConfigError(
                "data.validation: a search needs held-out rows to score layers and choose a mask; name a "
                "file, or set data.held_out to a share of the training documents."
            )
        self.tokens = sum(real_tokens(rows.batch) for rows, _ in self.rows)
        search.tokens += self.tokens * search.trainer.world_size
        self._known: dict[tuple[Any, ...], float] = {}

    def divergence(self, gates_L: Tensor, quick: bool = False) -> float:
        """Return the mean divergence (nats per token) from the teacher to the model, adapters off."""
        return self._measure(gates_L, quick, None)

    def adapted(self, gates_L: Tensor) -> float:
        """Return the same as :meth:`divergence` with the search's adapters on."""
        return self._measure(gates_L, False, None, adapted=True)

    def cross_entropy(self, gates_L: Tensor) -> float:
        """Return the mean cross-entropy (nats per supervised token) of the model on the labels."""
        return self._measure(gates_L, False, LABELS)

    @torch.no_grad()
    def _measure(self, gates_L: Tensor, quick: bool, by: Distillation | None, adapted: bool = False) -> float:
        key = (quick, by, adapted, tuple(gates_L.tolist()))
        if key not in self._known:
            read = self.rows[: -(-len(self.rows) // 4)] if quick else self.rows
            gates_L, divergence = gates_L.to(self.search.device), self.search.divergence
            with nullcontext() if adapted else self.search.parents_weights():
                losses = [divergence(rows, signal, gates_L, by) * len(rows) for rows, signal in read]
            count = losses[0].new_tensor(sum(len(rows) for rows, _ in read))
            self._known[key] = float(self.mean(torch.stack(losses).sum(), count))
        return self._known[key]

    def mean(self, sums: Tensor, counts: Tensor) -> Tensor:
        """Return ``sums / counts``, both added up over the ranks first."""
        reduce, device = self.search.trainer.strategy.reduce, self.search.device
        totals = [cast(Tensor, reduce(x.to(device), reduce_op="sum")).to(x.device) for x in (sums, counts)]
        return totals[0] / totals[1]

    @torch.no_grad()
    def states(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the open model's residual stream, a batch at a time: ``(h_JBTH, real_BT)``, J = L + 1."""
        for rows, _ in self.rows:
            stream: list[Tensor] = []

            def observe(layer: int, h_in: Tensor, h_out: Tensor, stream: list[Tensor] = stream) -> None:
                stream.extend([h_in] * (layer == 0) + [h_out])

            self.search.teacher_hidden(rows.batch, observe)
            yield torch.stack(stream), real(rows.batch)

    def gradients(self, visit: Callable[[int, nn.Module], None]) -> None:
        """Differentiate the mean cross-entropy of the open model with respect to the layers' weights.

        The weights are whole and not quantised: the search refuses others before anything is loaded.
        """
        search = self.search
        reduce = search.trainer.strategy.reduce
        weights = [p for layer in search.gates.layers for p in layer.parameters()]
        own = torch.tensor(sum(len(rows) for rows, _ in self.rows), device=search.device)
        supervised_tokens = int(cast(Tensor, reduce(own, reduce_op="sum")))
        try:
            with torch.enable_grad():
                for p in weights:
                    p.requires_grad_(True)
                for rows, signal in self.rows:
                    search.spent(rows.batch, search.num_layers)
                    loss = search.divergence(rows, signal, None, LABELS)
                    (loss * (len(rows) / supervised_tokens)).backward()
            for p in weights:
                p.grad = cast(Tensor, reduce(p.grad, reduce_op="sum"))
            for index, layer in enumerate(search.gates.layers):
                visit(index, layer)
        finally:
            for p in weights:
                p.requires_grad_(False)
                p.grad = None
