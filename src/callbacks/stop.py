"""End a run after a signal (SIGTERM, SIGINT) cleanly: between two batches, with a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from src.callbacks.last import LastCheckpoint
from src.training import stopping
from src.training.ranks import most
from src.training.stopping import Stopped


class StopOnSignal(Checkpoint):
    """Ends a run on SIGTERM or SIGINT, on all ranks at once, after the present step and its checkpoint.

    The command line adds it to every run. It derives from Lightning's ``Checkpoint`` because Lightning calls
    these after all other callbacks, so that the others have seen the whole step. A run that writes a cache
    needs no checkpoint: its finished shards stay.
    """

    def __init__(self) -> None:
        self._step = 0

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self._step = trainer.global_step
        stopping.patient(True)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Save a checkpoint and raise :class:`Stopped` if any rank has received a signal.

        With gradient accumulation it waits for the last batch of the step: half a step cannot be resumed.
        """
        if trainer.global_step == self._step or not (number := _agreed(trainer)):
            return
        for saver in trainer.checkpoint_callbacks:
            if isinstance(saver, LastCheckpoint):
                saver.save(trainer)
        raise Stopped(number)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Let a signal end the run at once from here on, if the last step is done.

        That step is saved, and what follows training, such as the polish of a mask, may take long.
        """
        if trainer.global_step == trainer.max_steps or trainer.should_stop:
            stopping.patient(False)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        stopping.patient(False)

    def on_predict_batch_start(self, *_: Any, **__: Any) -> None:
        stopping.patient(True)

    def on_predict_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if number := _agreed(trainer):
            raise Stopped(number)

    def on_predict_end(self, trainer: Trainer, module: LightningModule) -> None:
        stopping.patient(False)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """Write into a :class:`Stopped` at which step or batch the run ended, and how to resume it."""
        if isinstance(exception, Stopped):
            exception.where = exception.where or _where(trainer)


def _agreed(trainer: Trainer) -> int:
    """Return the number of the signal that any rank received, or 0: the same answer on all ranks."""
    number = most(stopping.received() or 0, trainer.strategy.root_device)
    if number:
        stopping.receive(number)
    return number


def _where(trainer: Trainer) -> str | None:
    if trainer.state.fn == TrainerFn.PREDICTING:
        loop = trainer.predict_loop
        batch = f"{loop.batch_progress.current.completed}{_of(sum(loop.max_batches))}"
        return f"stopped at batch {batch}; the cache is incomplete; resume with the same command"
    if trainer.state.fn != TrainerFn.FITTING:
        return None
    at = f"stopped at step {trainer.global_step}{_of(trainer.max_steps)}"
    savers = [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, LastCheckpoint)]
    saved = [*(saver.last_model_path for saver in savers), trainer.ckpt_path]
    path = next((path for path in saved if path and Path(path).exists()), None)
    if path is None:
        return f"{at}; nothing was saved; begin again with the same command"
    return f"{at}; resume with the same command and --ckpt_path {path}"


def _of(total: float) -> str:
    return f" of {total}" if 0 < total < float("inf") else ""
