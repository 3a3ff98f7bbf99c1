"""Switch on activation checkpointing by a callback, so that a strategy overlay of the trainer can do it."""

from __future__ import annotations

from lightning import Callback, LightningModule, Trainer

from src.training.stage import Stage


class CheckpointActivations(Callback):
    """Has the layers' activations recomputed in the backward pass: a third more work, far less memory.

    It sets ``checkpoint_activations`` of the stage, which a recovery heeds when it makes its student.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set ``checkpoint_activations`` of the stage before its model is loaded."""
        if isinstance(pl_module, Stage):
            pl_module.checkpoint_activations = True
