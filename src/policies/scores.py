"""Training-free importance scores ``[L]``; the higher, the more a layer matters."""

from __future__ import annotations

import torch
from torch import Tensor

from src.policies.base import Probe


def layer_kl(probe: Probe, num_layers: int) -> Tensor:
    """KL from the teacher when one layer alone is bypassed (nats per token); L forward passes."""
    scores = torch.zeros(num_layers)
    for layer in range(num_layers):
        gates = torch.ones(num_layers)
        gates[layer] = 0.0
        scores[layer] = probe.divergence(gates, quick=True)
    return scores


def block_influence(probe: Probe, num_layers: int) -> Tensor:
    """``1 - mean cos(h_l, h_{l+1})`` over the calibration tokens (ShortGPT, arXiv 2403.03853)."""
    total, count = torch.zeros(num_layers), torch.zeros(num_layers)

    def observe(layer: int, h_in: Tensor, h_out: Tensor) -> None:
        cosine = torch.nn.functional.cosine_similarity(h_in.float(), h_out.float(), dim=-1)
        total[layer] += (1 - cosine).sum().cpu()
        count[layer] += cosine.numel()

    probe.observe(observe)
    return total / count
