"""Log a stage while it runs: keep probabilities and their entropy, speed, memory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from src.files import write_json
from src.ranges import Count, checked
from src.training.memory import peak

if TYPE_CHECKING:
    from src.search import MaskSearch


class SearchMonitor(Callback):
    """Logs the entropy of the mask, and draws the keep probabilities of the units in TensorBoard.

    ``mask/entropy`` is the entropy (nats) of keeping each unit or not, summed over the units. TensorBoard
    gets a heat map of all steps so far, and as text the units that the policy would keep now. At the end the
    keep probabilities of all steps are written to ``gates.json`` in the run's log directory, for the report.

    Of channels and KV groups, too many to draw, the heat map and the file hold one number for each layer: the
    mean keep probability of those of its units that the policy would keep now.

    Args:
        every: optimiser steps between two heat maps.
    """

    @checked
    def __init__(self, every: Count = 20) -> None:
        self.every = every
        self.course: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        policy = cast("MaskSearch", module).policy
        keep_U = policy.keep_probabilities().clamp(0, 1)
        module.log("mask/entropy", torch.special.entr(keep_U).add(torch.special.entr(1 - keep_U)).sum())
        if policy.kind.wide:  # too many units to draw: how sure each layer is of those that it keeps
            kept_U = policy.gates(policy.harden()).cpu().bool()
            keep_U = keep_U[kept_U].view(policy.num_layers, -1).mean(1)
        self.course.append(keep_U)
        if trainer.global_step % self.every == 0:
            self._draw(trainer, module)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        path = Path(trainer.log_dir or ".") / "gates.json"  # log_dir asks all ranks
        if self.course and trainer.is_global_zero:
            self._draw(trainer, module)
            course = [[round(p, 4) for p in keep_L.tolist()] for keep_L in self.course]
            write_json(path, {"keep_probability": course})

    def _draw(self, trainer: Trainer, module: LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                image = torch.stack(self.course, dim=1)[None]
                tall = image.repeat_interleave(12, dim=1)
                logger.experiment.add_image("mask/keep_probability", tall, trainer.global_step)
                search = cast("MaskSearch", module)
                kept = str(search.mask(search.policy.harden(), {}))
                logger.experiment.add_text("mask/kept", kept, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        return {"course": self.course}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.course = state_dict["course"]


class Throughput(Callback):
    """Logs ``perf/tokens_per_s`` and ``perf/peak_memory_mib``: of the process, or on a GPU of its tensors."""

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._time, self._tokens = time.monotonic(), cast(int, module.tokens)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        now = time.monotonic()
        tokens = cast(int, module.tokens)
        speed = (tokens - self._tokens) / max(1e-9, now - self._time)
        self._time, self._tokens = now, tokens
        module.log("perf/tokens_per_s", speed, prog_bar=True)
        module.log("perf/peak_memory_mib", peak(module.device) / 2**20)
