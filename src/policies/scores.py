"""Compute importance scores of units without training; the higher, the more a unit matters.

Shapes: U units, L layers, J = L + 1 depths of the residual stream, B batch, T tokens, N real tokens, H
hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from src.errors import ConfigError
from src.policies.measuring import Probe


def unit_kl(probe: Probe, units: int) -> Tensor:
    """Return the KL ``[U]`` from the teacher (nats per token) when one unit alone is removed.

    It takes U forward passes, on a part of the calibration rows.
    """
    return torch.tensor(probe.walk(list(1 - torch.eye(units)), "KL of each unit", quick=True))


def finite_gradients(probe: Probe) -> Tensor:
    """Return the gates' gradients ``[B, U]`` of the batches that did not overflow; the others tell nothing.

    Raises:
        ConfigError: all overflowed.
    """
    grads_BU = probe.gate_gradients()
    grads_BU = grads_BU[grads_BU.isfinite().all(1)]
    if not len(grads_BU):
        raise ConfigError(
            "model.policy: the gradients of the gates are finite on no calibration batch. Compute in wider "
            "numbers: --trainer.precision 32-true, or --model.init_args.dtype float32."
        )
    return grads_BU


def salience(probe: Probe, units: int) -> Tensor:
    """Return ``|gate dLoss/dgate|`` ``[U]`` of the cross-entropy at open gates, the mean over batches.

    One forward and one backward pass score all units. The divergence has no such gradient: it is at its
    lowest where all gates are open. The absolute value is taken of each batch, because the mean gradient of a
    trained model is near zero (Molchanov et al., arXiv 1906.10771).
    """
    grads_BU = finite_gradients(probe).float().abs()
    return sum(grads_BU, torch.zeros(units)) / len(grads_BU)


def block_influence(probe: Probe, num_layers: int) -> Tensor:
    """Return ``1 - mean cos(h_l, h_{l+1})`` ``[L]``: how far each layer turns the residual stream.

    The mean is over calibration tokens (ShortGPT, arXiv 2403.03853).
    """
    total, count = torch.zeros(num_layers), torch.zeros(num_layers)
    for h_JBTH, real_BT in probe.states():
        h_JNH = h_JBTH[:, real_BT].float()
        cosine_LN = torch.nn.functional.cosine_similarity(h_JNH[:-1], h_JNH[1:], dim=-1)
        total += (1 - cosine_LN).sum(-1).cpu()
        count += cosine_LN.shape[-1]
    return probe.mean(total, count)
