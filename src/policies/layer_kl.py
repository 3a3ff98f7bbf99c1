"""The learned mask's own starting point as a method: the control that says what the search adds to it."""

from __future__ import annotations

from torch import Tensor

from src.policies.base import Probe
from src.policies.one_shot import OneShot
from src.policies.scores import layer_kl


class LayerKL(OneShot):
    """Score: KL from the teacher when the layer alone is bypassed, on the rows that start Gumbel-TopK."""

    def score(self, probe: Probe) -> Tensor:
        return layer_kl(probe, self.num_layers)
