"""Count the items on which two models disagree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from src.evaluate.intervals import LEVEL, RESAMPLES, SEED, Interval

CHANGE = "{value:+.3f} [{low:.3f}, {high:.3f}]"
"""Format of a difference with its interval, as text."""


def flips(correct: Sequence[bool], teacher_correct: Sequence[bool]) -> dict[str, float]:
    """Count the items that a model loses and gains against its teacher.

    Two models of equal accuracy may fail on different items; the flips show it.

    Args:
        correct: whether the model is right on each item.
        teacher_correct: whether the teacher is.

    Returns:
        ``lost``: items that only the teacher has right; ``gained``: those that only the model has right;
        ``p``: two-sided p-value of the two being equally likely, by McNemar's exact test.
    """
    pairs = list(zip(correct, teacher_correct, strict=True))
    lost, gained = pairs.count((False, True)), pairs.count((True, False))
    n = lost + gained
    tail = sum(math.comb(n, k) for k in range(min(lost, gained) + 1))
    return {"lost": lost, "gained": gained, "p": min(1.0, 2 * tail / 2**n)}


def difference(found: Mapping[str, float], items: int) -> Interval:
    """Return by how much more often a model is right than its teacher, with the interval of 95 %.

    The interval is paired: the items are resampled with what both models made of them (Efron's percentile
    bootstrap), which depends on the numbers of lost and gained items alone.

    Args:
        found: what :func:`flips` returned.
        items: how many were judged, at least one.

    Returns:
        The difference of the two shares of right items.
    """
    lost, gained = int(found["lost"]), int(found["gained"])
    chances = np.array([gained, lost, items - lost - gained]) / items
    drawn_R3 = np.random.default_rng(SEED).multinomial(items, chances, RESAMPLES)
    low, high = np.quantile(drawn_R3[:, 0] - drawn_R3[:, 1], [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) / items
    return {"value": (gained - lost) / items, "low": float(low), "high": float(high)}
