"""Random masks: the control of every search."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from src.policies.base import Probe
from src.policies.one_shot import OneShot
from src.ranges import Count, checked

Keep = tuple[int, ...]


class RandomSearch(OneShot):
    """The best of N uniform masks by divergence on the calibration rows.

    One mask is the plain random control and is not measured. The masks of a smaller N are among those of a
    larger. At equal budget with a learned mask, ``forward_tokens`` in the two mask files agree.

    Args:
        masks: how many masks are drawn.
        kwargs: ``always_keep``, ``seed``, ``candidates``, ``polish`` of the base class.
    """

    works_on = ("layer", "half")

    @checked
    def __init__(self, masks: Count = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.masks = masks

    def drawn(self) -> list[Keep]:
        """The masks, as kept units: uniform over all of the space, with repetition."""
        return [self.space.uniform(self.generator(0, number)) for number in range(self.masks)]

    def score(self, probe: Probe) -> Tensor:
        """The best mask's gates ``[U]``."""
        masks = self.drawn()
        if len(masks) == 1:
            return self.gates(masks[0])
        return self.gates(best_of(masks, lambda keep: probe.divergence(self.gates(keep))))


def best_of(masks: Iterable[Keep], measure: Callable[[Keep], float]) -> Keep:
    """The first mask of the lowest measure; one that is not a number never wins against one that is."""

    def value(keep: Keep) -> tuple[bool, float]:
        found = measure(keep)
        return math.isnan(found), found

    return min(masks, key=value)
