"""Save the last step of a run as ``last.ckpt``, whether its steps, its data or a signal end it."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class LastCheckpoint(ModelCheckpoint):
    """Is Lightning's ``ModelCheckpoint``, but ``last.ckpt`` holds the last step, unless the run fails.

    Lightning's own saves every ``every_n_train_steps``. A run that ends between two of these steps, as when
    its data end (``data.max_tokens``), leaves an older step in ``last.ckpt``, which an export would take
    without a warning.
    """

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save the final step too, before Lightning counts its epoch as complete.

        So a run with more steps can resume in the middle of that epoch.
        """
        super().on_train_batch_end(trainer, pl_module, *args)
        if trainer.global_step == trainer.max_steps or trainer.should_stop:
            self.save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of the last epoch too, before anything that follows training can fail."""
        super().on_train_epoch_end(trainer, pl_module)
        epochs = trainer.fit_loop.epoch_progress.current
        if epochs.processed == trainer.max_epochs:  # type: ignore[attr-defined]  # of the wider type it holds
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step if no one could know before that it was the last, as when the data end."""
        if not trainer.interrupted:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Save a checkpoint of the current step, unless it is saved already."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
