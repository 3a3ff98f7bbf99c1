"""Intervals by resampling: what would other test problems and other seeds have given?

A figure is a mean over problems (per token, for divergence) and over seeds. Problems and seeds are both
resampled with replacement (Efron's percentile bootstrap), problems alone where there is one seed. Every
interval uses the same draws, so that a difference is a paired one: two methods are compared on the same
problems and seeds.

Shapes: R resamples, S seeds, I items (problems).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Verdict = Literal["better", "worse", "tied"]
Interval = dict[str, float]
"""``value``, and the ends ``low`` and ``high`` of the 95 % interval."""

RESAMPLES, SEED, LEVEL = 10_000, 0, 0.95
MANY = 10_000
"""Items from which on the interval is the normal distribution's, which theirs has become."""


@lru_cache(maxsize=16)
def shares(count: int, stream: int, resamples: int = RESAMPLES) -> Array:
    """Return the share ``[R, count]`` of each of ``count`` items in each of R resamples of them."""
    rng = np.random.default_rng([SEED, stream])
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)
    return drawn / count


def interval(sums_SI: Array, sizes_I: Array, resamples: int = RESAMPLES) -> Interval:
    """The mean ``sums / sizes`` over seeds and items, with its percentile interval.

    Args:
        sums_SI: sum of a figure on each item, by seed.
        sizes_I: what to divide by: ones for a share of items, tokens for a mean over tokens.
        resamples: number of resamples.
    """
    seeds, items = sums_SI.shape
    value = sums_SI.mean(0).sum() / sizes_I.sum()
    if items > MANY:
        spread = 1.96 * np.sqrt(items * np.var(sums_SI.mean(0) - value * sizes_I)) / sizes_I.sum()
        return {"value": float(value), "low": float(value - spread), "high": float(value + spread)}
    items_RI = shares(items, 0, resamples)
    pooled_RI = shares(seeds, 1, resamples) @ sums_SI
    values = (pooled_RI * items_RI).sum(1) / (items_RI @ sizes_I)
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"value": float(value), "low": float(low), "high": float(high)}


def verdict(difference: Interval, higher_is_better: bool) -> Verdict:
    """Return whether a difference is an improvement: ``better``, ``worse``, or ``tied``.

    It is tied if its interval contains 0.
    """
    if difference["low"] <= 0 <= difference["high"]:
        return "tied"
    return "better" if (difference["value"] > 0) == higher_is_better else "worse"
