"""SLEB: remove the layer that the current model misses least, again and again (arXiv 2402.09025)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from src.policies.base import Probe
from src.policies.one_shot import OneShot
from src.policies.random_search import best_of


class SLEB(OneShot):
    """Greedy removal with re-evaluation: n rounds, each measuring every layer that is left.

    Args:
        measure: ``cross_entropy`` on the labels, as in the paper, or ``divergence`` from the teacher.
        always_keep: layers that may not be removed; the paper protects the first and the last.
        kwargs: ``seed``, ``candidates``, ``polish`` of the base class.
    """

    def __init__(
        self,
        measure: Literal["cross_entropy", "divergence"] = "cross_entropy",
        always_keep: Iterable[int] = (0, -1),
        **kwargs: Any,
    ) -> None:
        super().__init__(always_keep=always_keep, **kwargs)
        self.measure = measure

    def score(self, probe: Probe) -> Tensor:
        """The round ``[L]`` in which each layer goes; the target for those that stay."""
        measure = probe.cross_entropy if self.measure == "cross_entropy" else probe.divergence
        rounds = torch.full((self.num_layers,), float(self.target))
        keep = tuple(range(self.num_layers))
        for number in range(self.target):
            shorter = [tuple(k for k in keep if k != out) for out in self.free if out in keep]
            best = best_of(shorter, lambda kept: measure(self.gates(kept)))
            rounds[list(set(keep) - set(best))] = float(number)
            keep = best
        return rounds
