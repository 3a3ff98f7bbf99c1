"""Bypass back-propagation: keep probabilities learned by policy gradient (arXiv 2406.10576).

It needs forward passes alone, and brings the probabilities back to the budget after each step. It is the
natural control for a relaxed mask: the same objective, with a score function in place of the relaxation. Use
plain SGD. The draws are independent coin flips, so they remove the set number on average only; the hardened
mask removes it exactly.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from src.mask import Unit
from src.policies.base import MaskPolicy, Probe
from src.policies.scores import unit_kl
from src.ranges import Range, checked

EPS = 1e-7


class BypassBP(MaskPolicy):
    """Learns Bernoulli keep probabilities (in ``logits``, as probabilities) against a moving baseline.

    A loss that is not finite is dropped together with its mask.

    Args:
        init: start: ``kl`` (the rise of the KL when a layer alone is bypassed, standardised, through a
            sigmoid, shifted to the budget; the paper does so with a metric for channels) or ``uniform``.
        window: the baseline moves by ``1 / window`` towards the mean loss of each step.
        exact_score: divide the score by ``s (1 - s)`` and correct for the baseline's share of the draws: an
            unbiased gradient. The paper divides by the square root and by draws - 1.
        kwargs: ``always_keep``, ``seed``, ``candidates``, ``polish`` of the base class.
    """

    works_on = ("layer", "half")
    needs_gradient = False
    baseline: Tensor

    @checked
    def __init__(
        self,
        init: Literal["kl", "uniform"] = "kl",
        window: Annotated[float, Range(float, 1)] = 5.0,
        exact_score: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.init, self.window, self.exact_score = init, window, exact_score

    def setup(self, num_layers: int, remove: int, pinned: Iterable[int] = (), unit: Unit = "layer") -> None:
        super().setup(num_layers, remove, pinned, unit)
        self.register_buffer("baseline", torch.tensor(float("nan")))  # no loss seen yet
        with torch.no_grad():
            self.logits.fill_(1.0)
            self.logits[self.free] = self._budget() / len(self.free)

    def _budget(self) -> int:
        """Return the number of free units to keep."""
        return len(self.free) - self.closed

    def initialise(self, probe: Probe) -> None:
        if self.init == "uniform":
            return
        # Importance is heavy-tailed, as in the learned mask's own start: take logarithms.
        score = torch.log(unit_kl(probe, self.units)[self.free].clamp_min(0) + 1e-8)
        z = (score - score.mean()) / score.std(correction=0).clamp_min(1e-8)
        with torch.no_grad():
            self.logits[self.free] = shifted(torch.sigmoid(z), self._budget()).to(self.logits)

    def sample(self, step: int, draw: int) -> Tensor:
        """Independent coin flips: gates ``[U]`` of 0 and 1, on average ``self.closed`` zeros."""
        with torch.no_grad():  # the projection of the step before; doing it again changes nothing
            self.logits[self.free] = project(self.logits[self.free], self._budget())
        keep = self.logits.detach()[self.free].cpu()
        gates = torch.ones(self.units, device=self.logits.device)
        gates[self.free] = (torch.rand(len(keep), generator=self.generator(step, draw)) < keep).to(gates)
        return gates

    def surrogate(self, gates_DL: Tensor, losses_D: Tensor, grads_DL: Tensor | None) -> Tensor:
        """Return a scalar whose gradient is the paper's estimate of the gradient of the expected loss."""
        finite = losses_D.isfinite()
        if not finite.any():
            return self.nothing()
        losses, masks, s = losses_D[finite].to(self.logits), gates_DL[finite], self.logits.detach()
        share = 1.0 if self.baseline.isnan() else 1 / self.window  # of these losses in the baseline
        self.baseline.copy_(losses.mean() if share == 1 else self.baseline.lerp(losses.mean(), share))
        variance = (s + EPS) * (1 - s + EPS)
        score_DL = (masks - s) / (variance if self.exact_score else variance.sqrt())
        count = len(losses) - (share if self.exact_score else 1)
        estimate = ((losses - self.baseline)[:, None] * score_DL).sum(0) / (count or 1)
        return (self.logits * estimate)[self.free].sum()

    def keep_probabilities(self) -> Tensor:
        keep = torch.ones(self.units)
        keep[self.free] = project(self.logits.detach()[self.free], self._budget()).cpu()
        return keep


def shifted(value_L: Tensor, total: float) -> Tensor:
    """Return ``clip(value - v, 0, 1)`` with v such that the sum is ``total``, by bisection in float64."""
    value, low, high = value_L.double(), value_L.double().min() - 1, value_L.double().max()
    for _ in range(80):
        v = (low + high) / 2
        above = (value - v).clamp(0, 1).sum() > total
        low, high = torch.where(above, v, low), torch.where(above, high, v)
    return (value - v).clamp(0, 1).to(value_L)


def project(value_L: Tensor, total: float) -> Tensor:
    """Return the nearest point of ``{s in [0, 1]^L, sum s <= total}`` (arXiv 2406.10576)."""
    inside = value_L.clamp(0, 1)
    # A sum that the last projection left at the budget, up to rounding, stays to the last bit.
    return inside if inside.double().sum() <= total + 1e-5 else shifted(value_L, total)
