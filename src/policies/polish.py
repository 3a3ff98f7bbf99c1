"""Improve a mask by swaps of a kept and a removed unit, for as long as one lowers its divergence."""

from __future__ import annotations

from src.policies.swaps import Measure, gains, successor
from src.units.spaces import Kept, Space


def polish(kept: Kept, space: Space, measure: Measure, swaps: int = 64, finalists: int = 8) -> Kept:
    """Replace a mask by its best neighbour (one swap) for as long as that lowers its divergence.

    A round has two stages, because a deep model has many swaps (768 where 16 of 64 layers go). First, swaps
    are measured on the quick rows, a part of all rows; of too many those whose units promise most alone
    (:func:`gains`). Then the best of these are measured on all rows, and the one of lowest divergence is
    taken. Divergence is heavy-tailed over rows: a few rows are enough to drop bad masks, but not to rank good
    ones.

    Args:
        kept: kept units to start from.
        space: defines the neighbours of a mask.
        measure: divergences of masks, on all rows or on the quick ones.
        swaps: swaps of each round that are measured on the quick rows. If there are more, half as many are,
            and each unit alone; of more than twice so many units in the first round only.
        finalists: swaps of each round that are measured on all rows.

    Returns:
        The kept units of the first mask that none of its finalists improves on.
    """
    gain = dict[int, float]()

    def loss(swap: Kept) -> float:
        return sum(gain[out] for out in {*kept} - {*swap}) - sum(gain[back] for back in {*swap} - {*kept})

    def better() -> Kept:
        others = list(space.neighbours(kept))
        if len(others) > swaps:
            if len(gain) <= 2 * swaps:
                gain.update(gains(kept, others, measure))
            others = sorted(others, key=loss)[: swaps // 2]
        return successor(kept, others, measure, finalists)

    while (best := better()) != kept:
        kept = best
    return kept
