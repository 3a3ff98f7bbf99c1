"""Exact top-q selections with a relaxed backward pass.

Each form takes scores and returns a selection ``s_L`` that is exactly 0 or 1 with exactly q ones, and whose
gradient is that of a smooth surrogate (the straight-through estimator). The paper (arXiv 2511.17205) names
a Gumbel-TopK sampler with straight-through gradients; which relaxation it uses is not stated, so all of
these are switches.
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny


def gumbel(size: int, generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise ``[size]`` in float32, kept away from the infinities."""
    u = torch.rand(size, generator=generator).clamp(1e-20, 1 - 1e-7)
    return -torch.log(-torch.log(u))


def hard_topk(z_L: Tensor, q: int) -> Tensor:
    """1 at the q largest entries, 0 elsewhere."""
    return torch.zeros_like(z_L).scatter(0, z_L.topk(q).indices, 1.0)


def straight_through(hard_L: Tensor, soft_L: Tensor) -> Tensor:
    """Value of ``hard_L`` to the last bit, gradient of ``soft_L``."""
    return hard_L.detach() + (soft_L - soft_L.detach())


def softmax_form(z_L: Tensor, q: int, tau: float) -> Tensor:
    """Form A: one softmax, Jacobian ``(diag y - y y^T) / tau``; its mass is 1, not q."""
    return torch.softmax(z_L / tau, 0)


def successive_form(z_L: Tensor, q: int, tau: float) -> Tensor:
    """Form B: q softmaxes, each with the mass already taken removed (Xie and Ermon, arXiv 1901.10517).

    The mass is q; single entries may exceed 1, so they are no probabilities.
    """
    total = z_L * 0.0
    for _ in range(q):
        a = torch.softmax(z_L / tau, 0)
        total = total + a
        z_L = z_L + torch.log((1 - a).clamp_min(TINY))
    return total


def sigmoid_form(z_L: Tensor, q: int, tau: float) -> Tensor:
    """Form D: a sigmoid around the midpoint between the q-th and the next score."""
    top = z_L.detach().topk(min(q + 1, len(z_L))).values
    return torch.sigmoid((z_L - (top[q - 1] + top[-1]) / 2) / tau)


def identity_form(z_L: Tensor, q: int, tau: float) -> Tensor:
    """Control: the plain straight-through estimator, gradient 1."""
    return z_L


def elementary(theta_L: Tensor, q: int) -> Tensor:
    """Table ``[L+1, q+1]`` of elementary symmetric polynomials of ``exp(theta - c)``, by prefix.

    ``c`` is the q-th largest theta, which keeps ``e_q`` at one or more. Float64 and no logarithms: the log
    of an empty sum is infinite and has no second derivative.
    """
    theta = theta_L.double()
    weight = torch.exp(theta - theta.detach().topk(q).values[-1])
    row = torch.zeros(q + 1, dtype=torch.float64)
    row[0] = 1.0
    rows = [row]
    for w in weight:
        # Row i+1, column j: the subsets of size j among the first i+1, without or with the newest.
        row = row + w * torch.cat([row.new_zeros(1), row[:-1]])
        rows.append(row)
    return torch.stack(rows)


def marginals(theta_L: Tensor, q: int) -> Tensor:
    """Inclusion probabilities under ``P(S) ~ prod exp(theta_i), |S| = q`` (SIMPLE, arXiv 2210.01941).

    They are the gradient of ``log e_q(exp theta)``, and are themselves differentiable.
    """
    if q == 0:
        return theta_L * 0.0
    with torch.enable_grad():
        live = theta_L if theta_L.requires_grad else theta_L.detach().requires_grad_()
        log_e = elementary(live, q)[-1, q].log()
        (mu,) = torch.autograd.grad(log_e, live, create_graph=True)
    return mu


def exact_draw(theta_L: Tensor, q: int, generator: torch.Generator) -> Tensor:
    """Draw a subset of size q from the law of :func:`marginals`: walk back through the prefix table."""
    if q == 0:
        return torch.zeros_like(theta_L)
    table = elementary(theta_L.detach(), q)
    uniform = torch.rand(len(theta_L), generator=generator, dtype=torch.float64)
    chosen, left = torch.zeros_like(theta_L), q
    for i in range(len(theta_L), 0, -1):
        # P(i in S | left) = 1 - (subsets without i) / (all subsets).
        if left and uniform[i - 1] < 1 - table[i - 1, left] / table[i, left]:
            chosen[i - 1], left = 1.0, left - 1
    return chosen
