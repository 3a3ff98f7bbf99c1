"""Save the last step of a run as ``last.ckpt``, however the run ends."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class LastCheckpoint(ModelCheckpoint):
    """Lightning's ``ModelCheckpoint`` whose ``last.ckpt`` holds the last step however the run ends.

    With ``every_n_train_steps`` alone, a run of other than a multiple of it, or one that ends with its data
    (``data.max_tokens``), leaves the last multiple there, and an export would take it without a word.
    """

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save the final step before its epoch is counted as complete: a longer run resumes in its middle."""
        super().on_train_batch_end(trainer, pl_module, *args)
        if trainer.global_step == trainer.max_steps or trainer.should_stop:
            self.save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of the last epoch, before what comes after training costs anything."""
        super().on_train_epoch_end(trainer, pl_module)
        epochs = trainer.fit_loop.epoch_progress.current
        if epochs.processed == trainer.max_epochs:  # type: ignore[attr-defined]  # of the wider type it holds
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save a last step that did not show itself as the last, as when the data ended."""
        if not trainer.interrupted:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Save a checkpoint of the current step, unless there is one."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
