"""Relaxed selections of q units of each group, for the backward pass of an exact one.

A selection is exactly 0 or 1 with exactly q ones; its gradient is that of a smooth function, one of the forms
here (the straight-through estimator). E3-Pruner (arXiv 2511.17205) names a Gumbel-TopK sampler with
straight-through gradients. It does not state which relaxation it uses, so all of these are switches.

Each form takes perturbed scores ``z [..., L]``, the number q to select in each group, and a temperature tau;
it returns soft selections ``[..., L]``.

Shapes: L units; ``...`` are groups, each with a selection of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny


def gumbel(size: int, generator: torch.Generator) -> Tensor:
    """Return standard Gumbel noise ``[size]`` in float32, kept away from the infinities."""
    u = torch.rand(size, generator=generator).clamp(1e-20, 1 - 1e-7)
    return -torch.log(-torch.log(u))


def straight_through(hard_L: Tensor, soft_L: Tensor) -> Tensor:
    """Return the value of ``hard_L`` to the last bit, with the gradient of ``soft_L``."""
    return hard_L.detach() + (soft_L - soft_L.detach())


def softmax_form(z_L: Tensor, q: int, tau: float) -> Tensor:
    """Return one softmax, Jacobian ``(diag y - y y^T) / tau``; its sum is 1, not q."""
    return torch.softmax(z_L / tau, -1)


def successive_form(z_L: Tensor, q: int, tau: float) -> Tensor:
    """Return the sum of q softmaxes of the scores (Xie, Ermon, arXiv 1901.10517).

    Before each, a score falls by ``-log(1 - a)``, where a is the share that the softmax before gave it. The
    sum over the units is q; single entries may exceed 1, so they are no probabilities.
    """
    total = z_L * 0.0
    for _ in range(q):
        a = torch.softmax(z_L / tau, -1)
        total = total + a
        z_L = z_L + torch.log((1 - a).clamp_min(TINY))
    return total


def sigmoid_form(z_L: Tensor, q: int, tau: float) -> Tensor:
    """Return a sigmoid of each score around the midpoint between the q-th highest and the next."""
    top = z_L.detach().topk(min(q + 1, z_L.shape[-1])).values
    return torch.sigmoid((z_L - (top[..., q - 1, None] + top[..., -1:]) / 2) / tau)


def identity_form(z_L: Tensor, q: int, tau: float) -> Tensor:
    """Return the scores themselves, as a control: the plain straight-through estimator, gradient 1."""
    return z_L
