"""The learned mask's own starting point as a method: the control that says what the search adds to it."""

from __future__ import annotations

from torch import Tensor

from src.policies.base import Probe
from src.policies.one_shot import OneShot
from src.policies.scores import unit_kl


class LayerKL(OneShot):
    """Score: KL from the teacher when the unit alone is removed, on the rows that start Gumbel-TopK."""

    works_on = ("layer", "half")

    def score(self, probe: Probe) -> Tensor:
        return unit_kl(probe, self.units)
