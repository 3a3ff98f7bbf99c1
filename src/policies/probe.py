"""Measure masks on fixed calibration rows, to score units and to choose among masks.

:class:`CalibrationProbe` is the :class:`src.policies.measuring.Probe` that a search gives its policy.

Shapes: B batch, T tokens, H hidden, L layers, U units, J = L + 1 depths of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, Protocol, cast

import torch
from lightning import Trainer
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from src.data.batches import Batch, Supervised, real, real_tokens
from src.data.distinct import Distinct
from src.errors import ConfigError
from src.losses.distill import Distillation
from src.losses.signals import Signal
from src.mask import Mask
from src.models.gated import Gates, Observer
from src.models.head import OutputHead
from src.models.layers import num_layers, text_config
from src.models.midway import resumes
from src.models.prefixes import Front, Prefixes, PrefixMemory
from src.policies.measuring import Measure
from src.policies.walk import Walker
from src.training.data import Data

PREFIX_GIB = 1.0
"""Memory for streams that masks share (GiB), unless a config says otherwise."""
LABELS = Distillation(alpha=0.0, weight="none")
"""The plain language-model loss."""


class Measured(Protocol):
    """What a probe asks of the module whose model it measures; a search has all of it."""

    tokens: int
    forward_tokens: float
    distillation: Distillation
    read: Distinct
    calibration_batches: int
    num_layers: int
    gates: Gates
    head: OutputHead

    @property
    def data(self) -> Data:
        """The data module, which has the held-out rows."""

    @property
    def trainer(self) -> Trainer:
        """The attached trainer."""

    @property
    def device(self) -> torch.device:
        """Device of the model."""

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch to a device, as every LightningModule can."""

    def hidden(self, batch: Batch, gates_U: Tensor | None) -> Tensor:
        """Return the final hidden states ``[B, T, H]`` under gates ``[U]`` (None: all open)."""

    def teacher_hidden(self, batch: Batch, observer: Observer | None = None) -> Tensor:
        """Return the teacher's final hidden states ``[B, T, H]``: gates open, adapters off."""

    def parents_weights(self) -> AbstractContextManager[None]:
        """Switch the adapters off in the block, if there are any."""

    def mask(self, keep: Iterable[int], metrics: dict[str, float]) -> Mask:
        """Return the mask of a set of kept units."""

    def spent(self, batch: Batch, layers: float) -> None:
        """Count the tokens of a batch, for a pass through ``layers`` layers, as cost of the search."""

    def teacher_signal(self, rows: Supervised) -> Signal:
        """Return the teacher's top-k signal, which the loss compares with, on a batch."""

    def divergence(
        self, rows: Supervised, signal: Signal, gates_U: Tensor | None, by: Distillation | None = None
    ) -> Tensor:
        """Return the loss of the model under gates ``[U]`` (None: all open) on a batch.

        Args:
            rows: the batch.
            signal: the teacher's, on the same batch.
            gates_U: one gate for each unit.
            by: the loss; None is that of the search.
        """


def stream_bytes(config: PretrainedConfig, dtype: torch.dtype, tokens: int) -> int:
    """Return the bytes that the residual stream of ``tokens`` tokens takes at one depth."""
    return int(tokens * text_config(config).hidden_size * dtype.itemsize)


def prefix_memory(head: OutputHead, gates: Gates, rows: Sequence[Supervised], gib: float) -> PrefixMemory:
    """Return the memory for streams: as many as fit, none for a model whose pass cannot start in the middle.

    Args:
        head: of the gated model.
        gates: on its units.
        rows: the batches, of which the largest counts.
        gib: memory for the streams (GiB).
    """
    largest = max(each.batch["labels"].numel() for each in rows)
    stream = stream_bytes(head.model.config, head.model.dtype, largest)
    allowed = resumes(gates, lambda: head.hidden(head.few))
    return PrefixMemory(len(gates), int(gib * 2**30 // stream) if allowed else 0)


class CalibrationProbe(Walker):
    """Measures masks on the first ``calibration_batches`` validation batches.

    The teacher's signal on a batch is computed once, when it is first needed. Results are means over all
    ranks, so all ranks decide the same. A mask that was measured before is not measured again.

    Args:
        search: the search whose model is measured; its trainer must be attached.
        prefix_gib: memory for residual streams that masks share (GiB).

    Raises:
        ConfigError: there are no validation rows.
    """

    def __init__(self, search: Measured, prefix_gib: float = PREFIX_GIB) -> None:
        self.search, self.prefix_gib = search, prefix_gib
        self.rows: list[Supervised] = []
        for number, batch in enumerate(search.data.val_dataloader()):
            if number == search.calibration_batches:
                break
            search.read.add(batch)
            self.rows.append(Supervised.of(search.transfer_batch_to_device(batch, search.device, 0)))
        if not self.rows:
            raise ConfigError(
                "data.validation: a search needs held-out rows to score layers and choose a mask; name a "
                "file, or set data.held_out to a share of the training documents."
            )
        super().__init__(len(self.rows))
        self._signals: dict[int, Signal] = {}
        self.tokens = sum(real_tokens(rows.batch) for rows in self.rows)
        search.tokens += self.tokens * search.trainer.world_size

    @cached_property
    def memory(self) -> PrefixMemory:
        """The memory for streams that masks share."""
        with self.search.parents_weights():
            return prefix_memory(self.search.head, self.search.gates, self.rows, self.prefix_gib)

    def signal(self, batch: int) -> Signal:
        """Return the teacher's signal on a batch, by number; it is computed at the first call."""
        if batch not in self._signals:
            self._signals[batch] = self.search.teacher_signal(self.rows[batch])
        return self._signals[batch]

    @torch.no_grad()
    def run(self, batch: int, gates: Front, by: Measure, prefixes: Prefixes) -> float:
        rows, loss = self.rows[batch], LABELS if by == "cross_entropy" else None
        gates_U = torch.tensor(gates, device=self.search.device)
        with self.search.parents_weights(), self.search.gates.remember(prefixes):
            return float(self.search.divergence(rows, self.signal(batch), gates_U, loss) * len(rows))

    @torch.no_grad()
    def adapted(self, gates_L: Tensor) -> float:
        """Return :meth:`divergence` under gates ``[U]`` with the search's adapters on."""
        gates_U, divergence = gates_L.to(self.search.device), self.search.divergence
        signals = [self.signal(batch) for batch in range(self.batches)]
        pairs = zip(self.rows, signals, strict=True)
        return self.average([float(divergence(rows, s, gates_U) * len(rows)) for rows, s in pairs])

    @torch.no_grad()
    def judged(self, student: PreTrainedModel) -> float:
        """Return :meth:`divergence` of a model without gates, such as a recovered cut."""
        head, loss, sums = OutputHead(student), self.search.distillation, list[float]()
        for batch, rows in enumerate(self.rows):
            hidden_NH = head.at(rows.batch, rows.index_N)
            kl = loss(head, hidden_NH, rows.labels_N, self.signal(batch))["loss"]
            sums.append(float(kl * len(rows)))
            self.search.spent(rows.batch, num_layers(student.config))
        return self.average(sums)

    def average(self, sums: Sequence[float]) -> float:
        count = torch.tensor(float(sum(map(len, self.rows[: len(sums)]))))
        return float(self.mean(torch.tensor(sums).sum(), count))

    def mean(self, sums: Tensor, counts: Tensor) -> Tensor:
        """Return ``sums / counts`` after each is added up over the ranks; ``counts`` may be a scalar."""
        reduce, device = self.search.trainer.strategy.reduce, self.search.device
        totals = [cast(Tensor, reduce(x.to(device), reduce_op="sum")).to(x.device) for x in (sums, counts)]
        return totals[0] / totals[1]

    @torch.no_grad()
    def states(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the open model's residual stream ``h_JBTH`` at all depths and ``real_BT``, batch by batch."""
        for rows in self.rows:
            stream: list[Tensor] = []

            def observe(layer: int, h_in: Tensor, h_out: Tensor, stream: list[Tensor] = stream) -> None:
                stream.extend([h_in] * (layer == 0) + [h_out])

            self.search.teacher_hidden(rows.batch, observe)
            yield torch.stack(stream), real(rows.batch)

    @torch.no_grad()
    def finals(self, gates_L: Tensor | None) -> Iterator[Tensor]:
        """Yield the final hidden states ``[N, H]`` under gates ``[U]`` (None: all open), batch by batch."""
        gates_U = None if gates_L is None else gates_L.to(self.search.device)
        for rows in self.rows:
            with self.search.parents_weights():
                hidden_BTH = self.search.hidden(rows.batch, gates_U)
            yield hidden_BTH.flatten(0, 1)[rows.index_N]

    def gate_gradients(self) -> Tensor:
        """Return the gradient ``[B, U]`` of the mean cross-entropy of each of B batches at open gates."""
        search, size = self.search, len(self.search.gates)
        own = torch.tensor(len(self.rows), device=search.device)
        most = int(cast(Tensor, search.trainer.strategy.reduce(own, reduce_op="max")))
        sums_BU, count_B = (
            torch.zeros(most, size, dtype=torch.float64),
            torch.zeros(most, dtype=torch.float64),
        )
        for batch, rows in enumerate(self.rows):
            signal = self.signal(batch)
            open_U = torch.ones(size, device=search.device, requires_grad=True)
            with torch.enable_grad(), search.parents_weights():
                (grad_U,) = torch.autograd.grad(search.divergence(rows, signal, open_U, LABELS), open_U)
            search.spent(rows.batch, search.num_layers)
            sums_BU[batch], count_B[batch] = len(rows) * grad_U.double().cpu(), len(rows)
        return self.mean(sums_BU, count_B[:, None])

    @torch.no_grad()
    def activations(self) -> Tensor:
        """Return the absolute input ``[U]`` of the output projections: a unit's sum, the mean over tokens."""
        gates = self.search.gates
        sums, count = torch.zeros(len(gates.layers), len(gates) // len(gates.layers)), torch.zeros(1)
        for rows in self.rows:
            real_BT = real(rows.batch)

            def add(layer: int, x: Tensor, real_BT: Tensor = real_BT) -> None:
                total = x[real_BT].abs().float().sum(0)
                sums[layer] += total.unflatten(0, (sums.shape[1], -1)).sum(-1).cpu()

            with gates.watched(add):
                self.search.teacher_hidden(rows.batch)
            count += real_BT.sum().cpu()
        return self.mean(sums.flatten(), count)

    def weights(self) -> Iterator[tuple[int, str, nn.Parameter]]:
        """Yield each weight of the layers with the number of its layer and its name inside it."""
        for index, layer in enumerate(self.search.gates.layers):
            for name, weight in layer.named_parameters():
                yield index, name, weight

    def share(self, layer: int, name: str, values: Tensor) -> Tensor:
        """Return sums ``[U / L]`` of values over the entries of a weight that belong to each unit."""
        return self.search.gates.share(layer, name, values)

    def gradients(self, visit: Callable[[int, nn.Module], None]) -> None:
        """Differentiate the mean cross-entropy of the open model with respect to the layers' weights.

        The weights are whole and not quantised, because the search refuses others before anything is loaded.

        Args:
            visit: called as ``visit(layer, module)`` for each layer, with the gradient in its parameters'
                ``grad``.
        """
        search = self.search
        reduce = search.trainer.strategy.reduce
        weights = [p for layer in search.gates.layers for p in layer.parameters()]
        own = torch.tensor(sum(map(len, self.rows)), device=search.device)
        supervised_tokens = int(cast(Tensor, reduce(own, reduce_op="sum")))
        try:
            with torch.enable_grad():
                for p in weights:
                    p.requires_grad_(True)
                for batch, rows in enumerate(self.rows):
                    search.spent(rows.batch, search.num_layers)
                    loss = search.divergence(rows, self.signal(batch), None, LABELS)
                    (loss * (len(rows) / supervised_tokens)).backward()
            for p in weights:
                p.grad = cast(Tensor, reduce(p.grad, reduce_op="sum"))
            for index, layer in enumerate(search.gates.layers):
                visit(index, layer)
        finally:
            for p in weights:
                p.requires_grad_(False)
                p.grad = None
