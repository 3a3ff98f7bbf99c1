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
    """``1 - mean cos(h_l, h_{l+1})`` over the real calibration tokens (ShortGPT, arXiv 2403.03853)."""
    total, count = torch.zeros(num_layers), torch.zeros(num_layers)
    for h_JBTH, real_BT in probe.states():
        h_JNH = h_JBTH[:, real_BT].float()
        cosine_LN = torch.nn.functional.cosine_similarity(h_JNH[:-1], h_JNH[1:], dim=-1)
        total += (1 - cosine_LN).sum(-1).cpu()
        count += cosine_LN.shape[-1]
    return probe.mean(total, count)
