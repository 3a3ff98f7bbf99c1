"""Save the last step of a run as ``last.ckpt``, whether its steps, its data or a signal end it."""

from __future__ import annotations

import time
from typing import Annotated, Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from src.ranges import Range, checked


class LastCheckpoint(ModelCheckpoint):
    """Is Lightning's ``ModelCheckpoint``, but ``last.ckpt`` holds the last step, unless the run fails.

    Lightning's own saves every ``every_n_train_steps``. A run that ends between two of these steps, as when
    its data end (``data.max_tokens``), leaves an older step in ``last.ckpt``, which an export would take
    without a warning. And where a step takes long, so many of them are much to lose to a kill.

    Args:
        minutes: ``last.ckpt`` is written at the end of a step, too, if it is older than this.
        kwargs: those of ``ModelCheckpoint``.
    """

    @checked
    def __init__(
        self, *, minutes: Annotated[float, Range(float, 0, 1e6, "low")] = 10.0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.minutes = minutes
        self._steps, self._written = 0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._steps, self._written = trainer.global_step, time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save the final step too, before Lightning counts its epoch as complete.

        So a run with more steps can resume in the middle of that epoch.
        """
        super().on_train_batch_end(trainer, pl_module, *args)
        step = trainer.global_step
        ended = step > self._steps  # not between batches that are accumulated: their gradients are not saved
        if step == trainer.max_steps or trainer.should_stop or (ended and self._due(trainer)):
            self.save(trainer)
        if self._last_global_step_saved == step:
            self._written = time.monotonic()
        self._steps = step

    def _due(self, trainer: Trainer) -> bool:
        """Whether ``last.ckpt`` is too old; all ranks go by the clock of the first."""
        return trainer.strategy.broadcast(time.monotonic() - self._written > 60 * self.minutes)

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
