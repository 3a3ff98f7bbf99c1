"""Shortened LLaMA, PPL criterion (arXiv 2402.02834): drop the layers the language-model loss misses least."""

from __future__ import annotations

import torch
from torch import Tensor

from src.policies.base import Probe
from src.policies.one_shot import OneShot


class OneShotPerplexity(OneShot):
    """Score: cross-entropy with that one layer bypassed (the logarithm of the paper's perplexity).

    A forward pass for each layer that may be removed.
    """

    def score(self, probe: Probe) -> Tensor:
        scores = torch.zeros(self.num_layers)
        for layer in self.free:
            scores[layer] = probe.cross_entropy(self.gates(set(range(self.num_layers)) - {layer}))
        return scores
