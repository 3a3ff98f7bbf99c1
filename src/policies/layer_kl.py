"""Remove the units that cost least KL when each is removed alone.

A Gumbel-TopK search starts from these scores, so this policy shows what the search adds to its start.
"""

from __future__ import annotations

from torch import Tensor

from src.policies.measuring import Probe
from src.policies.one_shot import OneShot
from src.policies.scores import unit_kl


class LayerKL(OneShot):
    """Scores a unit by the KL from the teacher when it alone is removed, on calibration rows."""

    works_on = ("layer", "half", "kv_group")
    any_count = True

    def score(self, probe: Probe) -> Tensor:
        return unit_kl(probe, self.units)
