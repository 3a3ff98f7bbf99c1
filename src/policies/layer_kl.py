"""Remove the layers of the least KL alone: where a search starts, as the control of what it adds."""

from __future__ import annotations

from torch import Tensor

from src.policies.measuring import Probe
from src.policies.one_shot import OneShot
from src.policies.scores import unit_kl


class LayerKL(OneShot):
    """Scores a unit by the KL from the teacher without it alone, on the rows that start Gumbel-TopK."""

    works_on = ("layer", "half", "kv_group")
    any_count = True

    def score(self, probe: Probe) -> Tensor:
        return unit_kl(probe, self.units)
