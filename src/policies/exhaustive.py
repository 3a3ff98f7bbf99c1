"""Measure every legal mask: finds the true optimum on the calibration rows, where the masks are few."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from src.errors import ConfigError
from src.mask import Unit
from src.policies.measuring import Probe
from src.policies.one_shot import OneShot
from src.policies.random_search import best_of
from src.ranges import Count, checked


class Exhaustive(OneShot):
    """Measures the divergence of every mask that removes the set number of units, and takes the best.

    Args:
        limit: largest number of legal masks; with more, :meth:`setup` raises a :class:`ConfigError`.
        kwargs: ``always_keep``, ``seed``, ``candidates``, ``polish`` of the base class.
    """

    @checked
    def __init__(self, limit: Count = 10_000, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.limit = limit

    works_on = ("layer", "half", "kv_group")

    def setup(
        self, num_layers: int, remove: int, pinned: Iterable[int] = (), unit: Unit = "layer", width: int = 1
    ) -> None:
        super().setup(num_layers, remove, pinned, unit, width)
        if (count := self.space.size()) > self.limit:
            raise ConfigError(
                f"policy.limit: {self.closed} of {len(self.free)} {unit}s are {count:,} masks, above the "
                f"limit of {self.limit:,}. Remove fewer layers, name more in policy.always_keep, raise the "
                f"limit, or choose another policy, such as src.policies.RandomSearch."
            )

    def score(self, probe: Probe) -> Tensor:
        """Return the best mask's gates ``[U]``: a score of 1 for its units, 0 for the others."""
        masks = list(self.space)
        return self.gates(best_of(masks, probe.walk([self.gates(kept) for kept in masks], "all masks")))
