"""End a run between two batches after a signal."""

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

    The command line gives every run one. It is a :class:`Checkpoint`, which Lightning calls after all others,
    so that they have had their part of the step. A cache needs no saving: it keeps its finished shards.
    """

    def __init__(self) -> None:
        self._step = 0

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self._step = trainer.global_step
        stopping.patient(True)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Save and stop; the micro-batches of a step are one, because half a step cannot be resumed."""
        if trainer.global_step == self._step or not (number := _agreed(trainer)):
            return
        for saver in trainer.checkpoint_callbacks:
            if isinstance(saver, LastCheckpoint):
                saver.save(trainer)
        raise Stopped(number)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Stop waiting for a batch to end once the last step is saved: what follows it may take long."""
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
        """Add where the run stopped and how it goes on."""
        if isinstance(exception, Stopped):
            exception.where = exception.where or _where(trainer)


def _agreed(trainer: Trainer) -> int:
    """Return the signal that any rank received, or 0; all ranks stop after the same batch."""
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
