"""SoftTopK: numbers in [0, 1] that sum to exactly k, with the gradient of their definition.

Instruction-following pruning (arXiv 2501.02086) relaxes a choice of k units to the entropy-smoothed linear
programme: the maximum of ``z . s + sum of the entropies of s`` over ``s in [0, 1]^F`` with ``sum s = k``.
With the binary entropy its solution is ``s = sigmoid(z - t)``, and one number t makes the sum right.
Bisection finds t. The gradient is that of the solution, not of the bisection: with ``v = s (1 - s)`` the
Jacobian is ``diag(v) - v v^T / sum v`` (implicit function theorem).

Shapes: F units that are chosen among; ``...`` are choices of their own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BISECTIONS = 60
"""Halvings of an interval that holds t: with scores 1e3 apart, its rest is below the spacing of float64."""
TINY = torch.finfo(torch.float64).tiny


class _SoftTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, k: int) -> Tensor:
        odds = z.double()
        share = math.log(k / (z.shape[-1] - k))  # at t = z - share a unit alone has k / F
        low, high = odds.amin(-1, keepdim=True) - share, odds.amax(-1, keepdim=True) - share
        for _ in range(BISECTIONS):
            level = (low + high) / 2
            above = torch.sigmoid(odds - level).sum(-1, keepdim=True) > k
            low, high = torch.where(above, level, low), torch.where(above, high, level)
        soft = torch.sigmoid(odds - (low + high) / 2)
        ctx.save_for_backward(soft)
        return soft.to(z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (soft,) = ctx.saved_tensors
        v = soft * (1 - soft)
        mean = (v * grad).sum(-1, keepdim=True) / v.sum(-1, keepdim=True).clamp_min(TINY)
        return (v * (grad - mean)).to(grad), None


def soft_topk(z: Tensor, k: int, temperature: float = 1.0) -> Tensor:
    """Return ``sigmoid(z / temperature - t)`` ``[..., F]``, with t such that each choice sums to k.

    Args:
        z: scores ``[..., F]``; high is kept.
        k: the sum, 0 to F; at both ends nothing is left to choose, and there is no gradient.
        temperature: softness; towards zero the k highest scores become 1.
    """
    if k in (0, z.shape[-1]):
        return z * 0.0 + float(k > 0)
    out: Tensor = _SoftTopK.apply(z / temperature, k)  # type: ignore[no-untyped-call]
    return out
