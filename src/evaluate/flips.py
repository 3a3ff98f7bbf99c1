"""Count the items on which two models disagree."""

from __future__ import annotations

import math
from collections.abc import Sequence


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
