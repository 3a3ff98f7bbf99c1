"""Intervals by resampling: what would other test problems and other seeds have given?

A figure is a mean over problems (per token, for divergence) and over seeds. Problems and seeds are both
resampled with replacement (Efron's percentile bootstrap), problems alone where there is one seed. Every
interval uses the same draws, so that a difference is a paired one: two methods are compared on the same
problems and seeds.

Shapes: R resamples, S seeds, I items (problems).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Verdict = Literal["better", "worse", "tied"]
Interval = dict[str, float]
"""``value``, and the ends ``low`` and ``high`` of the 95 % interval."""

RESAMPLES, SEED, LEVEL = 10_000, 0, 0.95
MANY = 10_000
"""With more items the interval is computed from a normal distribution, to which resampling then converges."""


@lru_cache(maxsize=16)
def shares(count: int, stream: int, resamples: int = RESAMPLES) -> Array:
    """Return the share ``[R, count]`` that each of ``count`` items has in each of R resamples of them.

    ``stream`` selects a stream of random numbers: items and seeds are resampled independently.
    """
    rng = np.random.default_rng([SEED, stream])
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)
    return drawn / count


def interval(sums_SI: Array, sizes_I: Array, resamples: int = RESAMPLES) -> Interval:
    """Return the mean of a figure with its 95 % interval: the sums, averaged over seeds, over the sizes.

    Args:
        sums_SI: for each seed the figure of each item: 1 if it is right and 0 if not, or a sum over tokens.
        sizes_I: what each item counts for: 1, or its number of tokens; those of 0 are left out.
        resamples: number of resamples.
    """
    sums_SI, sizes_I = sums_SI[:, sizes_I > 0], sizes_I[sizes_I > 0]
    seeds, items = sums_SI.shape
    value = sums_SI.mean(0).sum() / sizes_I.sum()
    if items > MANY:
        of_items = items * np.var(sums_SI.mean(0) - value * sizes_I)
        spread = 1.96 * np.sqrt(of_items + np.var(sums_SI.sum(1)) / seeds) / sizes_I.sum()
        return {"value": float(value), "low": float(value - spread), "high": float(value + spread)}
    items_RI = shares(items, 0, resamples)
    pooled_RI = shares(seeds, 1, resamples) @ sums_SI
    values = (pooled_RI * items_RI).sum(1) / (items_RI @ sizes_I)
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"value": float(value), "low": float(low), "high": float(high)}


def matched(correct: Sequence[bool]) -> dict[str, Any]:
    """Return the share of right answers as ``exact_match``, and its interval of 95 %."""
    ends = interval(np.array([correct], dtype=float), np.ones(len(correct)))
    return {"exact_match": sum(correct) / len(correct), "exact_match_interval": [ends["low"], ends["high"]]}


def verdict(difference: Interval, higher_is_better: bool) -> Verdict:
    """Return whether a difference between two methods is an improvement of the first.

    Args:
        difference: the first method's figure less the second's, with its interval.
        higher_is_better: whether a larger figure is better.

    Returns:
        ``tied`` if the interval contains 0; else ``better`` or ``worse``.
    """
    if difference["low"] <= 0 <= difference["high"]:
        return "tied"
    return "better" if (difference["value"] > 0) == higher_is_better else "worse"
