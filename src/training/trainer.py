"""Lightning's trainer, changed so that checkpoints are whole and a resumed run still writes its result."""

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
    """The trainer of every run of the command line.

    It leaves SIGTERM to the command line: Lightning's own answer ends a run with status 0, and starts a
    collective within a signal handler. Its answer to SLURM's requeue signal stays.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:
            self.strategy.checkpoint_io = SafeCheckpointIO()
        setattr(self._signal_connector, "_sigterm_notifier_fn", lambda *_: None)  # noqa: B010 (mypy)

    def save_checkpoint(
        self, filepath: _PATH, weights_only: bool | None = None, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint, a file or a directory of parts; the one before stays until this one is whole.

        Raises:
            ConfigError: it cannot be written.
        """
        if "://" in str(filepath):
            super().save_checkpoint(filepath, weights_only, storage_options)
            return
        with _whole(Path(filepath), self.strategy) as stage:
            super().save_checkpoint(stage, weights_only, storage_options)

    def _run_stage(self) -> Any:
        """Run; a fit that is resumed at its last step still does what comes after it, such as hardening.

        Lightning skips that, and a run that was killed between its last step and its result would have none.
        """
        result = super()._run_stage()
        if self.state.fn == TrainerFn.FITTING and self.fit_loop.restarting:  # so it had nothing to do
            for saver in self.checkpoint_callbacks:
                if isinstance(saver, LastCheckpoint):
                    saver.save(self)  # where this run keeps its own
            self.fit_loop.on_run_end()
        return result


@contextmanager
def _whole(path: Path, strategy: Strategy) -> Iterator[Path]:
    """The temporary name under which all ranks write a checkpoint, which then takes the place of ``path``."""
    try:
        if strategy.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            sweep(path.parent)  # which one run alone writes to
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
    """The fault of the file system behind an error: writers of PyTorch wrap it, or stumble over it later."""
    while error is not None and not isinstance(error, OSError):
        failures = list(error.failures.values()) if isinstance(error, CheckpointException) else []
        error = failures[0][0] if failures else error.__cause__ or error.__context__
    return error
