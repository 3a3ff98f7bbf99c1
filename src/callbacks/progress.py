"""Show how far a run is: as a bar on a terminal, as a line now and then anywhere else."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich import get_console
from rich.progress import TaskID

from src.training.progress import Lines, on_terminal
from src.training.schedules import total_steps


class ProgressBar(RichProgressBar):
    """Shows Lightning's bar on a terminal, and nothing anywhere else.

    It counts the steps of the whole run. Lightning would begin anew in each epoch, and a streamed corpus has
    no last one. On a narrow terminal it shows the first figures only, so that it stays on one line.
    """

    BESIDE = 92
    """Columns that all but the figures need."""

    def __init__(self) -> None:
        super().__init__()

    @property
    def is_enabled(self) -> bool:
        return super().is_enabled and on_terminal()

    @property
    def total_train_batches(self) -> float:
        return total_steps(self.trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.train_progress_bar_id is None:
            super().on_train_epoch_start(trainer, pl_module)

    def get_metrics(self, *args: Any) -> dict[str, Any]:
        room, kept = get_console().width - self.BESIDE, dict[str, Any]()
        for name, value in super().get_metrics(*args).items():
            room -= len(f" {name}: {value if isinstance(value, str) else format(value, '.3f')}")
            if kept and room < 0:
                break
            kept[name] = value
        return kept

    def _update(self, progress_bar_id: TaskID | None, current: int, *args: Any, **keys: Any) -> None:
        steps = self.trainer.global_step if progress_bar_id == self.train_progress_bar_id else current
        super()._update(progress_bar_id, steps, *args, **keys)

    def _get_train_description(self, current_epoch: int) -> str:
        return f"{'steps':{len(self.validation_description)}}"


class ProgressLines(Callback):
    """Prints now and then how far a run is, and the figures that its progress bar would show.

    A run whose progress bar is switched off prints nothing.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.wanted = trainer.progress_bar_callback is not None and not on_terminal()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.lines = Lines("steps", trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.wanted:
            figures = [f"{key} {float(value):.4g}" for key, value in trainer.progress_bar_metrics.items()]
            self.lines.tell(trainer.global_step, total_steps(trainer), "".join(f", {f}" for f in figures))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.lines = Lines("batches")

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if self.wanted:
            self.lines.tell(batch_idx + 1, sum(map(float, trainer.num_predict_batches)))
