"""Shortened LLaMA, PPL criterion (arXiv 2402.02834): remove layers whose removal raises the loss least."""

from __future__ import annotations

import torch
from torch import Tensor

from src.policies.measuring import Probe
from src.policies.one_shot import OneShot


class OneShotPerplexity(OneShot):
    """Scores a unit by the cross-entropy without it alone (the logarithm of the paper's perplexity).

    It takes a forward pass for each unit that may be removed. The paper scores layers; halves are ours.
    """

    works_on = ("layer", "half", "kv_group")
    any_count = True

    def score(self, probe: Probe) -> Tensor:
        scores = torch.zeros(self.units)
        masks = list((1 - torch.eye(self.units))[self.free])
        scores[self.free] = torch.tensor(probe.walk(masks, "perplexity of each unit", "cross_entropy"))
        return scores
