"""Show how far a run is: as a bar on a terminal, as a line now and then anywhere else."""

from __future__ import annotations

import sys
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from src.training.progress import Lines
from src.training.schedules import total_steps


def on_terminal() -> bool:
    """Return whether a person sees what is printed as it is printed."""
    return sys.stdout.isatty() and sys.stderr.isatty()


class ProgressBar(RichProgressBar):
    """Shows Lightning's bar on a terminal, and nothing anywhere else.

    It counts steps. Lightning would name the bar after the epoch, and a streamed corpus has no last one.
    """

    def __init__(self) -> None:
        super().__init__()

    @property
    def is_enabled(self) -> bool:
        return super().is_enabled and on_terminal()

    def _get_train_description(self, current_epoch: int) -> str:
        return f"{'steps':{len(self.validation_description)}}"


class ProgressLines(Callback):
    """Prints now and then how far a run is, and the figures that its progress bar would show.

    A run whose progress bar is switched off prints nothing.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.wanted = trainer.progress_bar_callback is not None and not on_terminal()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.lines, self.before = Lines("steps"), trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.wanted:
            figures = [f"{key} {float(value):.4g}" for key, value in trainer.progress_bar_metrics.items()]
            steps = total_steps(trainer) - self.before
            self.lines.tell(trainer.global_step - self.before, steps, "".join(f", {f}" for f in figures))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.lines = Lines("batches")

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if self.wanted:
            self.lines.tell(batch_idx + 1, sum(map(float, trainer.num_predict_batches)))
