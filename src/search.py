"""Mask search: learn which layers to remove, against the frozen original.

Each step draws masks from the policy, runs the student under each, measures the divergence from the teacher
and tells the policy. Weights never move. The gradient of a draw with respect to its gates is taken at once
and its graph freed, so memory does not grow with the number of draws, and the graph Lightning sees (from
the policy's logits to the surrogate) is the same small one under every strategy.

By default the teacher is the student itself with its gates open: one copy of the weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from src.data.batches import real_tokens
from src.errors import ConfigError
from src.losses.distill import Distillation, supervised
from src.losses.signals import Signal, live_signal
from src.mask import Mask, git_sha
from src.models.cut import constraints
from src.models.gated import GatedLayers, Observer, freeze
from src.models.head import OutputHead
from src.models.layers import num_layers
from src.models.loading import Dtype, Quantization, check_vocabulary, load_config, load_model
from src.models.sharding import shard
from src.policies import MaskPolicy
from src.teachers import TeacherSource
from src.training.ranks import Part, total, world
from src.training.refusals import check_search

Batch = dict[str, Tensor]


class MaskSearch(LightningModule):
    """Learns a mask for one model.

    Args:
        model: Hub id or directory of the model to shorten.
        policy: how masks are drawn and learned.
        remove: layers to remove; give this or ``ratio``.
        ratio: share of the layers to remove, in (0, 1), rounded to the nearest count.
        revision: Hub revision of the model.
        dtype: type of the weights.
        quantize: load the one copy of the weights in ``int8`` or ``nf4``.
        attention: attention implementation; None lets transformers choose.
        teacher: another source of the teacher's signal; None is the student with open gates.
        distillation: divergence between the teacher's signal and the student.
        draws: masks drawn for each batch; they share the teacher's forward pass.
        optimizer: optimiser of the policy's logits.
        checkpoint_activations: recompute kept layers in the backward pass, to save memory.
        calibration_batches: validation batches that score layers and choose among the last masks.
    """

    def __init__(
        self,
        model: str,
        policy: MaskPolicy,
        remove: int | None = None,
        ratio: float | None = None,
        revision: str | None = None,
        dtype: Dtype = "float32",
        quantize: Quantization | None = None,
        attention: str | None = None,
        teacher: TeacherSource | None = None,
        distillation: Distillation | None = None,
        draws: int = 4,
        optimizer: OptimizerCallable = torch.optim.Adam,
        checkpoint_activations: bool = False,
        calibration_batches: int = 16,
    ) -> None:
        super().__init__()
        self.name, self.revision = model, revision
        self.loading: dict[str, Any] = {"dtype": dtype, "quantize": quantize, "attention": attention}
        self.policy, self.teacher, self.draws = policy, teacher, draws
        self.distillation = distillation or Distillation(weight="none")
        self.optimizer, self.checkpoint_activations = optimizer, checkpoint_activations
        self.calibration_batches = calibration_batches
        config = load_config(model, revision)
        self.commit: str | None = getattr(config, "_commit_hash", None)
        """Revision of the Hub that was loaded, by which mask and card pin the parent."""
        self.num_layers = num_layers(config)
        count = count_to_remove(self.num_layers, remove, ratio)
        limits = constraints(config)
        try:
            policy.setup(self.num_layers, count, limits.pinned(self.num_layers, count))
        except ConfigError as e:
            raise ConfigError(f"{e} {limits.reason}".strip()) from e
        self.tokens = 0
        self.forward_tokens = 0.0
        """Tokens passed through all layers; a backward pass through the activations counts as another."""

    # ------------------------------------------------------------------ model

    def refuse(self, trainer: Trainer, data: object) -> None:
        """Refuse, before anything is loaded, what cannot work with this trainer and these data."""
        check_search(trainer, data, self.loading["quantize"], self.teacher, self.policy)

    def setup(self, stage: str) -> None:
        self.refuse(self.trainer, getattr(self.trainer, "datamodule", None))

    def configure_model(self) -> None:
        """Load the frozen model and gate it; a tuple keeps it out of the module tree and checkpoints."""
        if hasattr(self, "_frozen"):
            return
        network = freeze(load_model(self.name, self.revision, **self.loading))
        self._frozen = (network,)
        self.gates = GatedLayers(network, self.checkpoint_activations)
        self.head = OutputHead(network)
        if self.device_mesh is not None:
            shard(network, self.device_mesh["data_parallel"])

    def on_fit_start(self) -> None:
        """Bring the frozen model to the device, which Lightning does not know of, and check its head."""
        (network,) = self._frozen
        if self.loading["quantize"] is None and self.device_mesh is None:
            cast(Any, network).to(self.device)
        self.head.check()
        check_vocabulary(cast(Any, self.trainer).datamodule.tokenizer, network)
        if self.teacher is not None:
            self.teacher.setup(self)

    def on_validation_start(self) -> None:
        """Ready too when validation is all that runs."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            self.on_fit_start()

    on_test_start = on_fit_start

    # ------------------------------------------------------------------ measuring

    def hidden(self, batch: Batch, gates_L: Tensor | None, observer: Observer | None = None) -> Tensor:
        """Final hidden states ``[B, T, H]`` of the model under gates (None is open)."""
        before = self.gates.evaluated
        with self.gates.use(gates_L, observer):
            hidden_BTH = self.head.hidden(batch)
        self.spent(batch, self.gates.evaluated - before)
        return hidden_BTH

    def spent(self, batch: Batch, layers: int) -> None:
        """Count a pass of a batch through some layers."""
        self.forward_tokens += real_tokens(batch) * self.trainer.world_size * layers / self.num_layers

    @torch.no_grad()
    def teacher_signal(self, batch: Batch, index: Tensor) -> Signal:
        """The teacher's signal at the supervised positions ``index`` of a batch."""
        if self.teacher is not None:
            return self.teacher.signal(batch, index)
        hidden_NH = self.hidden(batch, None).flatten(0, 1)[index]
        return live_signal(self.head, hidden_NH, self.distillation.k)

    def divergence(
        self,
        batch: Batch,
        signal: Signal,
        gates_L: Tensor | None,
        by: Distillation | None = None,
        part: Part | None = None,
    ) -> Tensor:
        """Loss of the model under gates against a teacher's signal on the same batch.

        Args:
            batch: rows.
            signal: what the teacher says at their supervised positions.
            gates_L: gates, or None for all open.
            by: the loss, if not the search's own.
            part: the batch of all ranks that this one is a part of; None: it is on its own.
        """
        index = supervised(batch["labels"])
        labels_N = batch["labels"].flatten()[index + 1]
        hidden_NH = self.hidden(batch, gates_L).flatten(0, 1)[index]
        return (by or self.distillation)(self.head, hidden_NH, labels_N, signal, part)["loss"]

    # ------------------------------------------------------------------ learning

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        index = supervised(batch["labels"])
        part = Part(len(index), real_tokens(batch), self.device)
        signal = self.teacher_signal(batch, index)
        micro = batch_idx % self.trainer.accumulate_grad_batches
        gates, losses, grads = [], [], []
        for draw in range(self.draws):
            asked = self.policy.sample(self.trainer.global_step, micro * self.draws + draw)
            leaf = asked.detach().requires_grad_(self.policy.needs_gradient)
            with torch.set_grad_enabled(self.policy.needs_gradient):
                loss = self.divergence(batch, signal, leaf, part=part)
            if self.policy.needs_gradient:
                grads.append(torch.autograd.grad(loss, leaf)[0])
                self.spent(batch, self.num_layers)
            gates.append(asked)
            losses.append(loss.detach())
        self.tokens += part.tokens
        losses_D, grads_DL = told(losses, grads)
        self.log("train/kl", losses_D.mean(), prog_bar=True)
        return self.policy.surrogate(torch.stack(gates), losses_D, grads_DL)

    def validation_step(self, batch: Batch, _: int) -> None:
        index = supervised(batch["labels"])
        part = Part(len(index), real_tokens(batch), self.device)
        gates_L = self.policy.gates(self.policy.harden())
        loss = self.divergence(batch, self.teacher_signal(batch, index), gates_L, part=part)
        self.log("val/kl", loss, prog_bar=True, batch_size=part.positions, sync_dist=True)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.policy.parameters())

    # ------------------------------------------------------------------ records

    def mask(self, keep: Iterable[int], metrics: dict[str, float]) -> Mask:
        """The mask file for a set of kept layers."""
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
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["budget"] = {"tokens": self.tokens, "forward_tokens": self.forward_tokens}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.tokens, self.forward_tokens = checkpoint["budget"].values()


def told(losses: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Losses ``[D]`` and their gradients ``[D, L]`` (None if there are none), means over the ranks.

    Every policy is told the same bits on every rank, so that all make the same update.
    """
    if world() == 1:
        return torch.stack(losses), torch.stack(grads) if grads else None
    columns = [torch.stack(losses)[:, None], *([torch.stack(grads)] if grads else [])]
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
