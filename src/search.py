"""Mask search: learn which layers to remove, against the frozen original.

Each step draws masks from the policy, runs the student under each, measures the divergence from the teacher
and tells the policy. Weights never move. The gradient of a draw with respect to its gates is taken at once
and its graph freed, so memory does not grow with the number of draws, and the graph Lightning sees (from
the policy's logits to the surrogate) is the same small one under every strategy.

By default the teacher is the student itself with its gates open: one copy of the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from lightning import Trainer
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from src.data.batches import Batch, Supervised, real_tokens
from src.errors import ConfigError
from src.losses.distill import Distillation
from src.losses.signals import Signal, live_signal
from src.mask import Mask, Unit, git_sha
from src.models.cut import constraints
from src.models.gated import Observer, freeze
from src.models.head import OutputHead
from src.models.layers import num_layers
from src.models.loading import load_config
from src.models.sharding import shard
from src.policies import MaskPolicy
from src.ranges import Count, Range, checked, inside_unit
from src.teachers import TeacherSource
from src.training.half import float32_by_default, true_half
from src.training.ranks import WholeBatch, total, world
from src.training.stage import Stage
from src.training.strategies import check_quantised, kind
from src.units.kinds import KINDS


@dataclass(frozen=True)
class Draw:
    """A mask that was drawn, and what came of it.

    Attributes:
        gates_U: as the policy sampled it, with its graph.
        loss: the divergence under it, detached.
        grad_U: gradient of the loss with respect to the gates, if the policy wants it.
    """

    gates_U: Tensor
    loss: Tensor
    grad_U: Tensor | None


class MaskSearch(Stage):
    """Learns a mask for one model.

    Args:
        model: Hub id or directory of the model to shorten.
        policy: how masks are drawn and learned.
        remove: layers to remove; give this or ``ratio``.
        ratio: share of the layers to remove, in (0, 1), rounded to the nearest count.
        unit: what is removed: whole layers (``layer``), or attentions and feed-forwards apart (``half``), as
            many of both; the halves that stay pair up into ordinary layers again.
        teacher: another source of the teacher's signal; None is the student with open gates.
        distillation: divergence between the teacher's signal and the student.
        draws: masks drawn for each batch; they share the teacher's forward pass.
        optimizer: optimiser of the policy's logits.
        calibration_batches: validation batches that score layers and choose among the last masks.
        kwargs: how the one copy of the weights is loaded; see :class:`src.training.stage.Stage`.
    """

    @checked
    def __init__(
        self,
        model: str,
        policy: MaskPolicy,
        remove: int | None = None,
        ratio: Annotated[float, inside_unit] | None = None,
        unit: Unit = "layer",
        teacher: TeacherSource | None = None,
        distillation: Distillation | None = None,
        draws: Annotated[int, Range(int, 1, 1000)] = 4,
        optimizer: OptimizerCallable = torch.optim.Adam,
        calibration_batches: Count = 16,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        self.unit, self.policy, self.teacher, self.draws = unit, policy, teacher, draws
        self.distillation = distillation or Distillation(weight="none")
        self.optimizer, self.calibration_batches = optimizer, calibration_batches
        config = load_config(model, self.revision)
        self.commit: str | None = getattr(config, "_commit_hash", None)
        """Revision of the Hub that was loaded, by which mask and card pin the parent."""
        self.num_layers = num_layers(config)
        count = count_to_remove(self.num_layers, remove, ratio)
        limits = constraints(config)
        try:
            policy.setup(self.num_layers, count, limits.pinned(self.num_layers, count), unit)
        except ConfigError as e:
            raise ConfigError(f"{e} {limits.reason}".strip()) from e
        self.forward_tokens = 0.0
        """Tokens passed through all layers; a backward pass through the activations counts as another."""

    # ------------------------------------------------------------------ model

    def refuse(self, trainer: Trainer, data: object) -> None:
        strategy, quantize = kind(trainer.strategy), self.loading.quantize
        if strategy in ("fsdp", "deepspeed"):
            raise ConfigError(
                "trainer.strategy: FSDP and DeepSpeed shard what is trained, which in a search is one number "
                "for each layer; the frozen weights would stay whole on every rank. Use "
                "configs/strategy/fsdp2.yaml, which shards the frozen weights and keeps the gates whole, or "
                "configs/strategy/ddp.yaml."
            )
        check_quantised(trainer, quantize, "FSDP2")
        name = type(self.policy).__name__
        if self.policy.differentiates_weights and quantize:
            raise ConfigError(
                f"model.quantize: {name} differentiates the weights, which '{quantize}' does not allow. Set "
                f"it to null, or choose another policy."
            )
        if self.policy.differentiates_weights and strategy == "fsdp2":
            raise ConfigError(
                f"trainer.strategy: {name} differentiates the weights, which FSDP2 holds in parts. Use "
                f"configs/strategy/ddp.yaml, or choose another policy."
            )
        if self.teacher is not None:
            self.teacher.refuse(trainer, data)

    def configure_model(self) -> None:
        """Load the frozen model and gate it; a tuple keeps it out of the module tree and checkpoints."""
        if hasattr(self, "_frozen"):
            return
        network = freeze(self.load(true_half(self)))
        self._frozen = (network,)
        self.gates = KINDS[self.unit].gate(network, self.checkpoint_activations)
        self.head = OutputHead(network)
        if self.device_mesh is not None:
            shard(network, self.device_mesh["data_parallel"])

    def on_fit_start(self) -> None:
        """Bring the frozen model to the device, which Lightning does not know of, and check its head."""
        (network,) = self._frozen
        if self.loading.quantize is None and self.device_mesh is None:
            nn.Module.to(network, self.device)
        self.check()
        if self.teacher is not None:
            self.teacher.setup(self)

    # ------------------------------------------------------------------ measuring

    def hidden(self, batch: Batch, gates_U: Tensor | None, observer: Observer | None = None) -> Tensor:
        """Final hidden states ``[B, T, H]`` of the model under gates (None is open)."""
        before = self.gates.evaluated
        with self.gates.use(gates_U, observer):
            hidden_BTH = self.head.hidden(batch)
        self.spent(batch, self.gates.evaluated - before)
        return hidden_BTH

    def spent(self, batch: Batch, layers: float) -> None:
        """Count a pass of a batch through some layers."""
        self.forward_tokens += real_tokens(batch) * self.trainer.world_size * layers / self.num_layers

    @torch.no_grad()
    def teacher_signal(self, rows: Supervised) -> Signal:
        """The teacher's signal at the supervised positions of a batch."""
        if self.teacher is not None:
            return self.teacher.signal(rows.batch, rows.index_N)
        hidden_NH = self.hidden(rows.batch, None).flatten(0, 1)[rows.index_N]
        return live_signal(self.head, hidden_NH, self.distillation.k)

    def divergence(
        self,
        rows: Supervised,
        signal: Signal,
        gates_U: Tensor | None,
        by: Distillation | None = None,
        whole: WholeBatch | None = None,
    ) -> Tensor:
        """Loss of the model under gates against a teacher's signal on the same batch.

        Args:
            rows: a batch and its supervised positions.
            signal: what the teacher says there.
            gates_U: gates, or None for all open.
            by: the loss, if not the search's own.
            whole: the batch of all ranks that this one is a part of; None: it is on its own.
        """
        hidden_NH = self.hidden(rows.batch, gates_U).flatten(0, 1)[rows.index_N]
        return (by or self.distillation)(self.head, hidden_NH, rows.labels_N, signal, whole)["loss"]

    # ------------------------------------------------------------------ learning

    def draw(self, rows: Supervised, signal: Signal, number: int, whole: WholeBatch | None = None) -> Draw:
        """Draw a mask and measure it; its graph is freed before this returns.

        Args:
            rows: a batch and its supervised positions.
            signal: what the teacher says there.
            number: of the draw, within the step.
            whole: the batch of all ranks.
        """
        gates_U = self.policy.sample(self.trainer.global_step, number)
        leaf_U, grad_U = gates_U.detach().requires_grad_(self.policy.needs_gradient), None
        with torch.set_grad_enabled(self.policy.needs_gradient):
            loss = self.divergence(rows, signal, leaf_U, whole=whole)
        if self.policy.needs_gradient:
            grad_U = torch.autograd.grad(loss, leaf_U)[0]
            self.spent(rows.batch, self.num_layers)
        return Draw(gates_U, loss.detach(), grad_U)

    @float32_by_default()
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        rows = Supervised.of(batch)
        whole = WholeBatch(len(rows), real_tokens(batch), self.device)
        signal = self.teacher_signal(rows)
        first = batch_idx % self.trainer.accumulate_grad_batches * self.draws
        drawn = [self.draw(rows, signal, first + number, whole) for number in range(self.draws)]
        self.tokens += whole.tokens
        losses_D, grads_DU = over_ranks(drawn)
        self.log("train/kl", losses_D.mean(), prog_bar=True)
        return self.policy.surrogate(torch.stack([each.gates_U for each in drawn]), losses_D, grads_DU)

    def validation_step(self, batch: Batch, _: int) -> None:
        rows = Supervised.of(batch)
        whole = WholeBatch(len(rows), real_tokens(batch), self.device)
        gates_U = self.policy.gates(self.policy.harden())
        loss = self.divergence(rows, self.teacher_signal(rows), gates_U, whole=whole)
        self.log("val/kl", loss, prog_bar=True, batch_size=whole.positions, sync_dist=True)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.policy.parameters())

    # ------------------------------------------------------------------ records

    @property
    def teacher_weights(self) -> str | None:
        """Fingerprint of the teacher: of a model of its own, or this one."""
        return (self.teacher and self.teacher.weights) or self.weights

    def mask(self, keep: Iterable[int], metrics: dict[str, float]) -> Mask:
        """The mask file for a set of kept units."""
        return Mask(
            model=self.name,
            revision=self.revision or self.commit,
            num_layers=self.num_layers,
            keep=tuple(keep),
            method=type(self.policy).__name__,
            seed=self.policy.seed,
            git_sha=git_sha(),
            tokens_seen=self.tokens,
            metrics=metrics,
            fingerprint=self.weights,
            unit=self.unit,
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["budget"] = {"tokens": self.tokens, "forward_tokens": self.forward_tokens}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.tokens, self.forward_tokens = checkpoint["budget"].values()


def over_ranks(drawn: Sequence[Draw]) -> tuple[Tensor, Tensor | None]:
    """Losses ``[D]`` of some draws and their gradients ``[D, U]`` (None if there are none), over all ranks.

    They are means over the ranks: every policy learns from the same bits on every rank, so that all make the
    same update.
    """
    losses_D = torch.stack([each.loss for each in drawn])
    grads = [each.grad_U for each in drawn if each.grad_U is not None]
    if world() == 1:
        return losses_D, torch.stack(grads) if grads else None
    columns = [losses_D[:, None], *([torch.stack(grads)] if grads else [])]
    table = total(torch.cat(columns, 1)) / world()
    return table[:, 0], table[:, 1:] if grads else None


def count_to_remove(layers: int, remove: int | None, ratio: float | None) -> int:
    """The number of layers to remove, from a count or from a ratio.

    Raises:
        ConfigError: both or neither are given, or the ratio is outside (0, 1).
    """
    if (remove is None) == (ratio is None):
        raise ConfigError("give exactly one of model.remove (a count) and model.ratio (a share).")
    if ratio is None:
        assert remove is not None
        return remove
    if not 0 < ratio < 1:
        raise ConfigError(f"model.ratio: {ratio} given; accepted: above 0 and below 1, such as 0.25.")
    return max(1, round(layers * ratio))
