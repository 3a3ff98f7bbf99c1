"""Draw random masks and take the best: a control that every search should beat at equal cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from src.policies.measuring import Probe
from src.policies.one_shot import OneShot
from src.ranges import Count, checked
from src.units.spaces import Kept


class RandomSearch(OneShot):
    """Takes the best of several uniform random masks, by divergence on the calibration rows.

    One mask is the plain random control and is not measured. The masks of a smaller number are among those of
    a larger one. For a comparison at equal cost, choose the number at which ``forward_tokens`` agrees with
    that in the learned mask's file.

    Args:
        masks: how many masks are drawn.
        kwargs: ``always_keep``, ``seed``, ``candidates``, ``polish`` of the base class.
    """

    works_on = ("layer", "half", "kv_group", "channel")

    @checked
    def __init__(self, masks: Count = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.masks = masks

    def draws(self) -> list[Kept]:
        """Return the masks, each as its kept units: uniform over all legal sets, repetitions possible."""
        return [self.space.uniform(self.generator(0, number)) for number in range(self.masks)]

    def score(self, probe: Probe) -> Tensor:
        """Return the best mask's gates ``[U]``: a score of 1 for its units, 0 for the others."""
        masks = self.draws()
        if len(masks) == 1:
            return self.gates(masks[0])
        return self.gates(best_of(masks, probe.walk([self.gates(kept) for kept in masks], "random masks")))


def ranked(masks: Sequence[Kept], values: Sequence[float]) -> list[Kept]:
    """Return masks by their values, the lowest first; equal ones stay in their order, NaN comes last."""
    return [masks[i] for i in sorted(range(len(masks)), key=lambda i: (math.isnan(values[i]), values[i]))]


def best_of(masks: Sequence[Kept], values: Sequence[float]) -> Kept:
    """Return the first of the masks that has the lowest value; NaN never wins against a number."""
    return ranked(masks, values)[0]
