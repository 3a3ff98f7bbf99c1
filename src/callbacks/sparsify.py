"""End a recovery with weights of which two of each four are zero (CAST, arXiv 2509.25996)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from src.data.batches import Batch, Supervised, real_tokens
from src.errors import ConfigError
from src.models.two_four import crowded, linear_maps
from src.optim import AdamS
from src.training.ranks import WholeBatch, from_all
from src.training.strategies import SHARDED, kind

if TYPE_CHECKING:
    from src.recover import Recovery

NOTHING = 1e-3
"""Nats by which the final masking may change the loss without a warning."""


class Sparsify(Callback):
    """Moves the ramp of :class:`src.optim.AdamS`, and after the last step sets what is masked to zero.

    It acts on the linear maps of the decoder layers. A checkpoint of the last step has exact zeros, and so
    has its export. The record of the run says by how much that changed the loss of the last batch, and
    which share of the squared norm of these maps went.
    """

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Refuse what would not end in the pattern, before anything is loaded.

        Raises:
            ConfigError: weights outside of the pattern would be added, are sharded, or the end is not known.
        """
        data, scope = getattr(trainer, "datamodule", None), getattr(module, "scope", None)
        reasons = {
            f"model.scope: '{scope}' does not train all weights; set it to full": scope != "full",
            f"trainer.strategy: '{kind(trainer.strategy)}' shards the weights, and a mask needs whole ones; "
            f"use configs/strategy/ddp.yaml": kind(trainer.strategy) in SHARDED,
            "trainer.max_steps: -1 given, and the ramp ends with the last step; give their number": (
                trainer.max_steps < 1
            ),
            "data.max_tokens: it may end the run before the ramp; give trainer.max_steps in its place": (
                getattr(data, "max_tokens", None) is not None
            ),
        }
        if found := [reason for reason, holds in reasons.items() if holds]:
            raise ConfigError(f"Sparsify: {found[0]}.")

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.prepare(trainer.optimizers[0], cast("Recovery", module).model)

    def prepare(self, optimizer: Optimizer, model: PreTrainedModel) -> None:
        """Tell the optimiser which matrices become sparse.

        Raises:
            ConfigError: it is another optimiser, or the model has no linear maps in its layers.
        """
        maps = linear_maps(model)
        if not isinstance(optimizer, AdamS):
            raise ConfigError(
                f"Sparsify: model.optimizer: {type(optimizer).__name__} does not mask weights; give "
                f"src.optim.AdamS."
            )
        if not maps:
            raise ConfigError(
                f"Sparsify: the layers of a '{model.config.model_type}' hold no linear maps of their own."
            )
        optimizer.sparsify(dict(maps.values()))

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        cast(AdamS, trainer.optimizers[0]).ramp((trainer.global_step + 1) / trainer.max_steps)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if trainer.global_step != trainer.max_steps:
            return
        recovery = cast("Recovery", module)
        before = _loss(recovery, batch)
        share = cast(AdamS, trainer.optimizers[0]).harden()
        change = _loss(recovery, batch) - before
        assert crowded(recovery.model) == 0
        recovery.figures["sparse"] = {
            "maps": len(linear_maps(recovery.model)), "share": share, "loss": before, "change": change,
        }  # fmt: skip
        told = f"two of four: the final masking took {share:.1e} of the squared norm; loss {change:+.1e} nats"
        rank_zero_info(told)
        if abs(change) > NOTHING:
            rank_zero_warn(f"{told}. More steps, a higher rate or penalty leave less to mask.")

    def on_save_checkpoint(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note that an export has to be sparse; one of an earlier step would not be."""
        checkpoint["sparse"] = True


@torch.no_grad()
def _loss(recovery: Recovery, batch: Batch) -> float:
    """Return the loss of a batch, the mean over ranks."""
    rows = Supervised.of(batch)
    whole = WholeBatch(len(rows), real_tokens(batch), recovery.device)
    with recovery.trainer.precision_plugin.forward_context():
        losses = from_all(float(recovery.losses(rows, whole)["loss"]))
    return sum(losses) / len(losses)
