"""Measure a few real steps of the run that is planned, on this machine: ``plan --trial 3``.

The run begins as ``fit`` or ``predict`` begins it, and ends after these steps; its directory is removed. A
padded batch is as long as its longest row, so one batch may have several times the tokens of another. So the
seconds are taken by the token, and a step is planned with as many tokens as a step of the corpus has.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import islice, pairwise
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from src.data.batches import Batch, real_tokens
from src.errors import ConfigError
from src.plan.devices import Tried, this_machine
from src.plan.planner import Planner
from src.training.memory import peak
from src.training.running import lightning

ROWS, BATCHES = 2048, 256
"""Rows of the corpus whose tokens are counted, in so many batches at most."""


class Enough(Exception):
    """Ends a run whose steps have been timed.

    Args:
        tried: what they took.
    """

    def __init__(self, tried: Tried) -> None:
        super().__init__("enough steps")
        self.tried = tried


class Marks(Callback):
    """Notes when steps end and how many tokens they have, padding included; ends the run after some.

    Args:
        steps: number of steps that are timed, after a first, which takes memory that the others find.
    """

    def __init__(self, steps: int) -> None:
        self.steps, self.marks, self.before = steps, list[float](), 0
        self.tokens = [0]
        """Of each step, the one that goes on included."""
        self.seen = list[tuple[int, int]]()
        """Tokens of each batch, with padding and without."""

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Leave out what writes to places of its own."""
        kept = [each for each in getattr(trainer, "callbacks") if not _writes(each)]  # noqa: B009 (mypy)
        setattr(trainer, "callbacks", kept)  # noqa: B010 (mypy)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._see(batch)
        if trainer.global_step > self.before:  # accumulated batches make one step
            self.before = trainer.global_step
            self._mark(module, trainer.train_dataloader, trainer.accumulate_grad_batches)

    def on_predict_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self._see(batch)
        self._mark(module, trainer.predict_dataloaders)

    def _see(self, batch: Batch) -> None:
        self.rows = len(batch["input_ids"])
        self.seen.append(sizes(batch))
        self.tokens[-1] += self.seen[-1][0]

    def _mark(self, module: LightningModule, corpus: Any, batches: int = 1) -> None:
        """Note the end of a step of so many batches of the corpus."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())
        if len(self.marks) > self.steps:
            memory = peak(module.device)
            timed = zip(pairwise(self.marks), self.tokens[1:], strict=True)
            each = statistics.median((end - begin) / tokens for (begin, end), tokens in timed)
            ahead = islice(corpus, min(BATCHES, -(-ROWS // self.rows)))
            sample = list(map(sizes, ahead)) or self.seen  # max_tokens may end the text here
            padded, real = (batches * statistics.mean(column) for column in zip(*sample, strict=True))
            raise Enough(Tried(each * padded, memory, real))
        self.tokens.append(0)


def sizes(batch: Batch) -> tuple[int, int]:
    """Return the number of tokens of a batch, with padding and without."""
    return batch["input_ids"].numel(), real_tokens(batch)


def tried(argv: Sequence[str], stage: str, steps: int) -> Tried:
    """Return what some steps take.

    Args:
        argv: arguments of ``fit`` or ``predict``.
        stage: ``search``, ``recover`` or ``cache``.
        steps: number of steps that are timed.

    Raises:
        ConfigError: ``fit`` would refuse the arguments, or the run ends before so many steps.
    """
    with tempfile.TemporaryDirectory() as folder:
        elsewhere = ["--trainer.logger=false", f"--trainer.default_root_dir={folder}", "--ckpt_path=null"]
        if stage == "cache":
            elsewhere.append(f"--model.init_args.out={folder}/cache")
        marks = [f"--trainer.callbacks+={Marks.__module__}.Marks", f"--trainer.callbacks.steps={steps}"]
        try:
            lightning(["predict" if stage == "cache" else "fit", *argv, *elsewhere, *marks])
        except Enough as enough:
            return enough.tried
    raise ConfigError(f"--trial: {steps} given, and the text ended before. Give less, or more text.")


def _writes(callback: Callback) -> bool:
    return isinstance(callback, ModelCheckpoint) or bool(getattr(callback, "path", None))


def check(steps: int, planner: Planner) -> None:
    """Refuse a trial of what this process is not, or of more steps than the run has.

    Raises:
        ConfigError: the plan is for another device, or for several; or the run is as short as its trial.
    """
    device, ranks = planner.device.name, planner.ranks
    if steps >= planner.steps:
        raise ConfigError(f"--trial: {steps} given; accepted: less than the run's steps, {planner.steps:,}.")
    if device != (here := this_machine()) or ranks > 1:
        raise ConfigError(
            f"--trial: it times steps in this process; --device {device} x {ranks} given, and here is 1 x "
            f"{here or 'a GPU that configs/devices.json does not list'}. Leave --trial out."
        )
