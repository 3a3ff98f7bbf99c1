"""SLEB: remove, n times, the layer whose removal raises the loss least (arXiv 2402.09025)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from src.policies.measuring import Measure, Probe
from src.policies.one_shot import OneShot
from src.policies.random_search import best_of


class SLEB(OneShot):
    """Removes units greedily in n rounds, each of which measures every unit that is left.

    With halves, which is our extension, a round removes two that lie side by side, so that those left still
    pair up.

    Args:
        measure: ``cross_entropy`` on the labels, as in arXiv 2402.09025, or ``divergence`` from the teacher.
        always_keep: layers that may not be removed; arXiv 2402.09025 protects the first and the last.
        kwargs: ``seed``, ``candidates``, ``polish`` of the base class.
    """

    works_on = ("layer", "half")
    any_count = True

    def __init__(
        self,
        measure: Measure = "cross_entropy",
        always_keep: Iterable[int] = (0, -1),
        **kwargs: Any,
    ) -> None:
        super().__init__(always_keep=always_keep, **kwargs)
        self.measure: Measure = measure

    def score(self, probe: Probe) -> Tensor:
        """Return the round in which each unit goes, ``[U]``; for those that stay, the number of rounds."""
        rounds = torch.full((self.units,), float(self.target))
        keep = tuple(range(self.units))
        for number in range(self.target):
            masks = list(self.spare(number).shorter(keep))
            about = f"greedy, removal {number + 1} of {self.target}"
            best = best_of(masks, probe.walk([self.gates(kept) for kept in masks], about, self.measure))
            rounds[list(set(keep) - set(best))] = float(number)
            keep = best
        return rounds
