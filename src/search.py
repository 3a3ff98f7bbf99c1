"""Learn which units to remove from a model, against the frozen original.

Each step draws masks from the policy, runs the student under each, measures its divergence from the teacher
and hands the losses back to the policy. Weights do not move, unless adapters train beside them. The gradient
of a draw with respect to its gates (and to the adapters) is taken at once and its graph freed, but for the
layers that the next draw begins with too. So memory does not grow with the number of draws, and the graph
that Lightning sees (from the policy's logits to the surrogate) is the same small one under every strategy. By
default the teacher is the student itself, its gates open and its adapters off: one copy of the weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any

import torch
from lightning import Trainer
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from src.data.batches import Batch, Supervised, real_tokens
from src.errors import ConfigError
from src.losses.distill import Distillation
from src.losses.signals import Signal, live_signal
from src.mask import WIDE, Mask, Unit, git_sha
from src.models.gated import Observer, freeze
from src.models.head import OutputHead
from src.models.midway import resumes
from src.models.sharding import shard
from src.policies import MaskPolicy
from src.policies.draws import apart, over_ranks, together
from src.policies.race import Race
from src.ranges import Count, Range, checked
from src.teachers import TeacherSource
from src.training.adapters import Adapters
from src.training.half import float32_by_default, true_half
from src.training.ranks import WholeBatch
from src.training.sized import Sized
from src.training.strategies import check_quantised, kind
from src.units.amount import Budget
from src.units.kinds import KINDS


class MaskSearch(Sized):
    """Learns a mask for one model, or one for each of several sizes (budgets).

    With several budgets, draws take turns among them, and the loss is the mean of the logarithms of their
    divergences, because the divergence of the largest removal would drown the others.

    Args:
        model: Hub id or directory of the model to shorten.
        policy: how masks are drawn and learned.
        unit: what is removed: whole layers (``layer``), or attentions and feed-forwards apart, as many of
            both (``half``); the halves that stay pair up into ordinary layers again. Or parts of each layer's
            width: KV heads with their query heads (``kv_group``), channels of the feed-forward (``channel``).
        teacher: another source of the teacher's signal; None is the student with open gates.
        distillation: divergence between the teacher's signal and the student.
        draws: masks drawn for each batch; they share the teacher's forward pass.
        optimizer: optimiser of the policy's logits, and of the adapters in a group of their own.
        adapters: small additions to the weights that train while the mask is learned; None moves no weight.
        calibration_batches: validation batches that score layers and choose among the last masks.
        race: chooses the final mask by short recoveries; None chooses it by the divergence of the cut.
        kwargs: how much to remove; see :class:`src.training.sized.Sized`.
    """

    @checked
    def __init__(
        self,
        model: str,
        policy: MaskPolicy,
        unit: Unit = "layer",
        teacher: TeacherSource | None = None,
        distillation: Distillation | None = None,
        draws: Annotated[int, Range(int, 1, 1000)] = 4,
        optimizer: OptimizerCallable = torch.optim.Adam,
        adapters: Adapters | None = None,
        calibration_batches: Count = 16,
        race: Race | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, unit, **kwargs)
        self.policy, self.teacher, self.draws = policy, teacher, draws
        self.distillation = distillation or Distillation(weight="none")
        self.optimizer, self.calibration_batches = optimizer, calibration_batches
        self.adapters, self.race = adapters, race
        most = self.budgets[-1].remove
        if len(self.budgets) > 1 and not policy.any_count:
            raise ConfigError(
                f"model.budgets: {type(policy).__name__} chooses for one count alone. Set model.ratio in its "
                f"place, or choose another policy, such as src.policies.GumbelTopK."
            )
        if self.width is not None and adapters is not None:
            raise ConfigError(
                f"model.adapters: they lie beside whole weights, and a mask of {WIDE[unit]} takes parts of "
                f"these. Set it to null, or model.unit to layer."
            )
        pinned = self.limits.pinned(self.num_layers, most)
        try:
            policy.setup(self.num_layers, most, pinned, unit, self.width or 1)
        except ConfigError as e:
            raise ConfigError(f"{e} {self.limits.reason}".strip()) from e
        self.shares = False
        """Whether the passes of a step share what they compute alike; known once the model has run."""
        self.forward_tokens = 0.0
        """Tokens passed through all layers; a backward pass through the activations counts as another."""

    # ------------------------------------------------------------------ model

    def refuse(self, trainer: Trainer, data: object) -> None:
        strategy, quantize = kind(trainer.strategy), self.loading.quantize
        if strategy in ("fsdp", "deepspeed"):
            raise ConfigError(
                "trainer.strategy: FSDP and DeepSpeed shard what is trained, here a number for each layer; "
                "the frozen weights would stay whole on every rank. Use configs/strategy/fsdp2.yaml, which "
                "shards these and keeps the gates whole, or configs/strategy/ddp.yaml."
            )
        check_quantised(trainer, quantize, "FSDP2")
        self.policy.refuse(quantize, adapted=self.adapters is not None, in_parts=strategy == "fsdp2")
        if self.teacher is not None:
            self.teacher.refuse(trainer, data, self.distillation)
        if self.adapters is not None:
            self.adapters.refuse(quantize)
        if self.race is not None:
            self.race.refuse(trainer, quantize, adapted=self.adapters is not None)

    def configure_model(self) -> None:
        """Load the frozen model and put gates on it; a tuple keeps it out of module tree and checkpoints."""
        if hasattr(self, "_frozen"):
            return
        network = freeze(self.load(true_half(self)))
        self._frozen = (network,)
        self.gates = KINDS[self.unit].gate(network, self.checkpoint_activations, self.limits)
        self.head = OutputHead(network)
        if self.adapters is not None:
            self.adapters.attach(network)
        if self.device_mesh is not None:
            moving = [] if self.adapters is None else self.adapters.moving()
            shard(network, self.device_mesh["data_parallel"], whole=moving)

    def on_fit_start(self) -> None:
        """Bring the frozen model to the device, which Lightning does not know of, and check its head."""
        (network,) = self._frozen
        if self.loading.quantize is None and self.device_mesh is None:
            nn.Module.to(network, self.device)
        self.check()
        if self.teacher is not None:
            self.teacher.setup(self)
        alone = self.adapters is None and self.device_mesh is None and not self.checkpoint_activations
        self.shares = alone and resumes(self.gates, lambda: self.head.hidden(self.head.few))

    # ------------------------------------------------------------------ measuring

    def hidden(self, batch: Batch, gates_U: Tensor | None, observer: Observer | None = None) -> Tensor:
        """Run the student under gates (None: all open), adapters on; return its last states ``[B, T, H]``.

        ``observer`` is called with each layer's number, input and output.
        """
        before = self.gates.evaluated
        with self.gates.use(gates_U, observer):
            hidden_BTH = self.head.hidden(batch)
        self.spent(batch, self.gates.evaluated - before)
        return hidden_BTH

    def teacher_hidden(self, batch: Batch, observer: Observer | None = None) -> Tensor:
        """Run the student as its own teacher, gates open, adapters off; return last states ``[B, T, H]``."""
        with self.parents_weights():
            return self.hidden(batch, None, observer)

    def parents_weights(self) -> AbstractContextManager[None]:
        """Switch off the adapters, if there are any, in the block: the parent's own weights are at work."""
        return nullcontext() if self.adapters is None else self.adapters.off()

    def spent(self, batch: Batch, layers: float) -> None:
        """Add the cost of a pass of a batch through so many layers to ``forward_tokens``.

        It is the batch's tokens, times the ranks, times the share that these layers are of all.
        """
        self.forward_tokens += real_tokens(batch) * self.trainer.world_size * layers / self.num_layers

    @torch.no_grad()
    def teacher_signal(self, rows: Supervised, open_U: Tensor | None = None) -> Signal:
        """Return the teacher's signal at the supervised positions of a batch.

        Args:
            rows: the batch.
            open_U: open gates to run the student under as its own teacher; None runs it without.
        """
        if self.teacher is not None:
            return self.teacher.signal(rows.batch, rows.index_N)
        with self.parents_weights():
            hidden_BTH = self.hidden(rows.batch, open_U)
        return live_signal(self.head, hidden_BTH.flatten(0, 1)[rows.index_N], self.distillation.asks)

    def divergence(
        self,
        rows: Supervised,
        signal: Signal,
        gates_U: Tensor | None,
        by: Distillation | None = None,
        whole: WholeBatch | None = None,
    ) -> Tensor:
        """Return the loss of the model under gates against a teacher's signal on the same batch.

        Args:
            rows: a batch and its supervised positions.
            signal: the teacher's signal at these positions.
            gates_U: gates of all units; None is all open.
            by: the divergence; None is the search's own.
            whole: the batch of all ranks that this one is a part of; None if it is on its own.
        """
        hidden_NH = self.hidden(rows.batch, gates_U).flatten(0, 1)[rows.index_N]
        return (by or self.distillation)(self.head, hidden_NH, rows.labels_N, signal, whole)["loss"]

    # ------------------------------------------------------------------ learning

    def aimed(self, budget: Budget, held: Iterable[int] = ()) -> AbstractContextManager[None]:
        """Let the policy draw and harden masks of a budget in the block; they keep the units ``held`` too."""
        pinned = KINDS[self.unit].of(self.limits.pinned(self.num_layers, budget.remove))
        return self.policy.aimed(budget.remove, {*pinned, *held})

    def sample(self, number: int) -> Tensor:
        """Return the gates of a mask drawn for the step at hand; its ``number`` there decides the noise."""
        step = self.trainer.global_step
        with self.aimed(self.budgets[(step + number) % len(self.budgets)]):
            return self.policy.sample(step, number)

    @float32_by_default()
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        rows = Supervised.of(batch)
        whole = WholeBatch(len(rows), real_tokens(batch), self.device)
        first = batch_idx % self.trainer.accumulate_grad_batches * self.draws
        masks = [self.sample(first + number) for number in range(self.draws)]
        drawn = (together if self.shares else apart)(self, rows, masks, whole)
        self.tokens += whole.tokens
        losses_D, grads_DU = over_ranks(drawn)
        self.log("train/kl", losses_D.mean(), prog_bar=True)
        if len(self.budgets) > 1 and grads_DU is not None:
            grads_DU = grads_DU / losses_D[:, None].clamp_min(torch.finfo(losses_D.dtype).tiny)
        loss = self.policy.surrogate(torch.stack([each.gates_U for each in drawn]), losses_D, grads_DU)
        return loss if self.adapters is None else loss + self.adapters.surrogate(self.draws)

    def validation_step(self, batch: Batch, _: int) -> None:
        rows = Supervised.of(batch)
        whole = WholeBatch(len(rows), real_tokens(batch), self.device)
        with self.parents_weights():
            signal = self.teacher_signal(rows)
            for budget in self.budgets:
                with self.aimed(budget):
                    gates_U = self.policy.gates(self.policy.harden())
                loss = self.divergence(rows, signal, gates_U, whole=whole)
                for name in dict.fromkeys([budget.suffix, *([""] if budget is self.budgets[-1] else [])]):
                    self.log(f"val/kl{name}", loss, prog_bar=True, batch_size=whole.positions, sync_dist=True)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.adapters is None:
            return self.optimizer(self.policy.parameters())
        return self.optimizer([{"params": list(self.policy.parameters())}, self.adapters.group()])

    # ------------------------------------------------------------------ records

    @property
    def teacher_weights(self) -> str | None:
        """Fingerprint of the teacher's weights: of a model of its own, else of the model to shorten."""
        return (self.teacher and self.teacher.weights) or self.weights

    def mask(self, keep: Iterable[int], metrics: dict[str, float]) -> Mask:
        """Return a mask that keeps the units ``keep``, with the origin and the figures of this search."""
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
            width=self.width,
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["budget"] = {"tokens": self.tokens, "forward_tokens": self.forward_tokens}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.tokens, self.forward_tokens = checkpoint["budget"].values()
