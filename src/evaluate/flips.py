"""Count the items on which two models disagree, and tell their difference with its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from src.evaluate.intervals import Interval

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
    """Return by how much more often a model is right than its teacher, with a paired interval of 95 %.

    The interval is Wald's with half an item added to each of the four cells (both right, one, the other,
    none), which holds where few items are lost or gained, or none (Agresti and Min, Statistics in Medicine
    24, 2005). It is about a difference that is a little nearer to 0 than ``value``.

    Args:
        found: what :func:`flips` returned.
        items: how many were judged.

    Returns:
        The difference of the two shares of right items.
    """
    change, count = found["gained"] - found["lost"], items + 2
    spread = 1.96 * math.sqrt(found["gained"] + found["lost"] + 1 - change**2 / count) / count
    low, high = max(-1.0, change / count - spread), min(1.0, change / count + spread)
    return {"value": change / items, "low": low, "high": high}
