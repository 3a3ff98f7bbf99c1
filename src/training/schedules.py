"""Schedules of a run, each a function of nothing but its progress in [0, 1].

Progress follows from the trainer's step and the tokens seen, so a resumed run needs no counter of its own.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from lightning import Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from src.errors import ConfigError
from src.training.data import Metered, data_of

Decay = Literal["cosine", "linear", "constant"]


def warmup_decay(progress: float, warmup: float, final: float, shape: Decay) -> float:
    """Return the factor on the learning rate: it rises linearly from 0 to 1, then decays to ``final``.

    Args:
        progress: share of the run that is done, in [0, 1].
        warmup: share of the run during which the factor rises.
        final: factor at the end of the run.
        shape: form of the decay; with ``constant`` the factor stays 1.
    """
    if progress < warmup:
        return progress / warmup
    decayed = min(1.0, (progress - warmup) / max(1e-12, 1 - warmup))
    if shape == "constant":
        return 1.0
    fall = 1 - decayed if shape == "linear" else 0.5 * (1 + math.cos(math.pi * decayed))
    return final + (1 - final) * fall


def interpolate(progress: float, start: float, end: float, shape: Literal["linear", "exponential"]) -> float:
    """Return the value on the way from ``start`` to ``end`` at a progress.

    Args:
        progress: share of the way, clipped to [0, 1].
        start: value at 0.
        end: value at 1.
        shape: ``linear``, or ``exponential`` (a straight line of the logarithm).
    """
    progress = min(1.0, max(0.0, progress))
    if shape == "linear":
        return start + (end - start) * progress
    return start * math.pow(end / start, progress)


def total_steps(trainer: Trainer) -> float:
    """Return the number of optimiser steps of the run; infinity if only ``data.max_tokens`` ends it.

    Raises:
        ConfigError: nothing ends the run, because a streamed corpus has no length.
    """
    steps = trainer.estimated_stepping_batches
    if 0 < steps < math.inf:
        return steps
    data = data_of(trainer)
    if not isinstance(data, Metered) or data.max_tokens is None:
        raise ConfigError(
            "trainer.max_steps: not given, and a streamed corpus has no length; give it, or data.max_tokens."
        )
    return math.inf


def share_done(trainer: Trainer, steps: float, total: float) -> float:
    """Return the share of the run that is done, in [0, 1]: by steps or by tokens, whichever is further.

    Args:
        trainer: of the run; its data may count tokens up to ``data.max_tokens``.
        steps: steps so far.
        total: steps of the run.
    """
    data, tokens = data_of(trainer), 0.0
    if isinstance(data, Metered) and data.max_tokens:
        tokens = data.tokens_seen / data.max_tokens
    return max(steps / total, tokens)


def with_warmup(optimizer: Optimizer, trainer: Trainer, warmup: float, final: float, shape: Decay) -> Any:
    """Return an optimiser with a schedule of its rate, in the form that ``configure_optimizers`` returns.

    Args:
        optimizer: of the run.
        trainer: of the run.
        warmup: share of the run during which the rate rises.
        final: factor on the rate at the end.
        shape: form of the decay; see :func:`warmup_decay`.
    """
    total = total_steps(trainer)

    def factor(step: int) -> float:
        return warmup_decay(share_done(trainer, step, total), warmup, final, shape)

    schedule = LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
