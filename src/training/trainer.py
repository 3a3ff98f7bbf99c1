"""Lightning's trainer, with checkpoints that appear whole or not at all.

A fit that is resumed at its last step, where nothing is left to train, still writes its result.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.checkpoint.api import CheckpointException

from src.callbacks.last import LastCheckpoint
from src.errors import ConfigError
from src.files import beside, discard, settle, sweep, unwritten
from src.training.checkpoints import SafeCheckpointIO


class Trainer(lightning.Trainer):
    """Trains, validates and predicts for every verb of Lightning's command line.

    SIGTERM is handled by :mod:`src.training.stopping`, because Lightning's own handler ends a run with status
    0 and starts a collective inside a signal handler. Its handler of SLURM's requeue signal stays.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:
            self.strategy.checkpoint_io = SafeCheckpointIO()
        setattr(self._signal_connector, "_sigterm_notifier_fn", lambda *_: None)  # noqa: B010 (mypy)

    def save_checkpoint(
        self, filepath: _PATH, weights_only: bool | None = None, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint, which replaces the last one only when it is complete.

        Args:
            filepath: a file, or a directory to which each rank writes its part.
            weights_only: leave out the states of optimiser and callbacks.
            storage_options: of Lightning, for remote paths.

        Raises:
            ConfigError: it cannot be written.
        """
        if "://" in str(filepath):
            super().save_checkpoint(filepath, weights_only, storage_options)
            return
        with _whole(Path(filepath), self.strategy) as stage:
            super().save_checkpoint(stage, weights_only, storage_options)

    def _run_stage(self) -> Any:
        """Run the stage, and end a fit that was resumed at its last step as any other fit ends.

        Lightning skips the end of such a fit. Without this, a run that is killed between its last step and
        its result, such as the hardened mask, would never have that result.
        """
        result = super()._run_stage()
        if self.state.fn == TrainerFn.FITTING and self.fit_loop.restarting:  # no step was left to do
            for saver in self.checkpoint_callbacks:
                if isinstance(saver, LastCheckpoint):
                    saver.save(self)  # in the directory of this run, not of the one it resumes
            self.fit_loop.on_run_end()
        return result


@contextmanager
def _whole(path: Path, strategy: Strategy) -> Iterator[Path]:
    """Give all ranks a temporary path to write a checkpoint to, which is then renamed to ``path``."""
    try:
        if strategy.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            sweep(path.parent)  # only this run writes there
        stage = Path(strategy.broadcast(str(beside(path, "partial"))))
        try:
            yield stage
            if strategy.is_global_zero:
                settle(stage, path)
        finally:
            if strategy.is_global_zero:
                discard(stage)
    except (OSError, RuntimeError, CheckpointException) as e:
        fault = _disk_fault(e)
        if fault is None:
            raise
        raise ConfigError(
            f"checkpoint: {unwritten(path, fault)} Make room or choose another directory, and resume from "
            f"the last one with --ckpt_path."
        ) from e


def _disk_fault(error: BaseException | None) -> OSError | None:
    """Return the file system's error behind an exception, or None.

    PyTorch's writers wrap it in an error of their own, or raise another while they handle it.
    """
    while error is not None and not isinstance(error, OSError):
        failures = list(error.failures.values()) if isinstance(error, CheckpointException) else []
        error = failures[0][0] if failures else error.__cause__ or error.__context__
    return error
