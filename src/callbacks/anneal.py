"""Schedules of a search: the temperature of its relaxation, and how many units a draw removes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, cast

from lightning import Callback, LightningModule, Trainer

from src.ranges import Positive, Share, checked
from src.training.schedules import interpolate, share_done, total_steps

if TYPE_CHECKING:
    from src.search import MaskSearch


class TemperatureAnnealing(Callback):
    """Moves the temperature of the policy's relaxation from ``start`` to ``end`` over the run.

    Where a policy draws hard masks, the temperature shapes the gradients only, not which masks are drawn.

    Args:
        start: temperature at the first step.
        end: temperature at the last step.
        shape: ``linear`` or ``exponential``.
    """

    @checked
    def __init__(
        self, start: Positive = 4.0, end: Positive = 0.1, shape: Literal["linear", "exponential"] = "linear"
    ) -> None:
        self.start, self.end, self.shape = start, end, shape

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        progress = share_done(trainer, trainer.global_step, max(1, total_steps(trainer) - 1))
        temperature = interpolate(progress, self.start, self.end, self.shape)
        cast("MaskSearch", module).policy.temperature = temperature
        module.log("mask/temperature", temperature)


class PruningCurriculum(Callback):
    """Raises the number of units that a draw removes from few to the full number n, in the course of the run.

    At step t of T, counted from 0, the way is ``p = min(1, (t + 1) / (until T))``, and the number
    ``ceil(n p)``; or ``ceil(n (1 - (1 - p)^3))``, which is fast at first.

    Args:
        until: share of the run after which the full number is removed; 0 removes it from the first step.
        shape: ``linear`` or ``cubic``.
    """

    @checked
    def __init__(self, until: Share = 0.5, shape: Literal["linear", "cubic"] = "linear") -> None:
        self.until, self.shape = until, shape

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        policy = cast("MaskSearch", module).policy
        target = policy.target
        progress = share_done(trainer, trainer.global_step + 1, total_steps(trainer))
        way = 1.0 if self.until == 0 else min(1.0, progress / self.until)
        share = way if self.shape == "linear" else 1 - (1 - way) ** 3
        policy.remove = math.ceil(round(target * share, 9))
        module.log("mask/removed", float(policy.remove))
