"""Measure the neighbours of a mask in few steps: what its units cost alone, and the best of many swaps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite

from src.policies.random_search import best_of, ranked
from src.units.spaces import Kept

Measure = Callable[[Sequence[Kept], bool], Sequence[float]]
"""Called as ``measure(masks, quick)``; returns their divergences, on a part of the rows if ``quick``."""
HUGE = 1e6
"""Counts for a divergence that overflowed, nats."""


def gains(kept: Kept, others: Sequence[Kept], measure: Measure) -> dict[int, float]:
    """Return what keeping each unit lowers the divergence by, with all other units as they are in a mask.

    Where units do not act on each other, a swap lowers it by just the difference of its units.

    Args:
        kept: kept units of the mask.
        others: kept units of its neighbours; the units that they exchange are measured.
        measure: divergences of masks; it is asked for the quick rows, and for sets of other sizes.
    """
    units = sorted({unit for other in others for unit in {*other} ^ {*kept}})
    measured = measure([kept, *(tuple(sorted({*kept} ^ {unit})) for unit in units)], True)
    at, *values = (value if isfinite(value) else HUGE for value in measured)
    return {
        unit: value - at if unit in kept else at - value for unit, value in zip(units, values, strict=True)
    }


def successor(kept: Kept, others: Sequence[Kept], measure: Measure, finalists: int) -> Kept:
    """Return the best of a mask and others, found in two steps; of equal ones the mask itself.

    All others are measured on the quick rows, and then the best of these on all rows, with the mask.

    Args:
        kept: kept units of the mask.
        others: kept units of each of the others.
        measure: divergences of masks, on all rows or on the quick ones.
        finalists: how many others are measured on all rows.
    """
    field = [kept, *ranked(others, measure(others, True))[:finalists]]
    return best_of(field, measure(field, False))
