"""Shortened LLaMA, PPL criterion (arXiv 2402.02834): remove the units without which the loss rises least."""

from __future__ import annotations

import torch
from torch import Tensor

from src.policies.measuring import Probe
from src.policies.one_shot import OneShot


class OneShotPerplexity(OneShot):
    """Scores a unit by the cross-entropy when it alone is removed: the logarithm of the perplexity.

    It takes a forward pass for each unit that may be removed. arXiv 2402.02834 scores layers; other units are
    our extension.
    """

    works_on = ("layer", "half", "kv_group")
    any_count = True

    def score(self, probe: Probe) -> Tensor:
        scores = torch.zeros(self.units)
        masks = list((1 - torch.eye(self.units))[self.free])
        scores[self.free] = torch.tensor(probe.walk(masks, "perplexity of each unit", "cross_entropy"))
        return scores
