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

from src.errors import ConfigError
from src.mask import Unit
from src.policies.base import MaskPolicy
from src.policies.measuring import Probe
from src.policies.scores import salience, unit_kl
from src.ranges import Range, checked

EPS = 1e-7


class BypassBP(MaskPolicy):
    """Learns the probability that each unit is kept, from the losses of masks drawn with these probabilities.

    ``logits`` holds the probabilities themselves. A loss counts by its difference from a moving baseline. A
    loss that is not finite is dropped together with its mask.

    Args:
        init: start of the probabilities. ``kl`` takes the KL of each unit bypassed alone; its logarithm is
            standardised, goes through a sigmoid, and is shifted to the budget (arXiv 2406.10576 does so with
            a metric for channels). ``salience`` does so with the gates' gradients; ``uniform`` measures
            nothing.
        window: the baseline moves by ``1 / window`` towards the mean loss of each step.
        exact_score: make the gradient unbiased: divide ``mask - s`` by ``s (1 - s)``, and the sum over draws
            by their number less the weight of these draws in the baseline. arXiv 2406.10576 divides by
            ``sqrt(s (1 - s))``, and by the number of draws less one.
        kwargs: ``always_keep``, ``seed``, ``candidates``, ``polish`` of the base class.
    """

    works_on = ("layer", "half", "kv_group", "channel")
    needs_gradient = False
    baseline: Tensor

    @checked
    def __init__(
        self,
        init: Literal["kl", "salience", "uniform"] = "kl",
        window: Annotated[float, Range(float, 1)] = 5.0,
        exact_score: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.init, self.window, self.exact_score = init, window, exact_score

    def setup(
        self, num_layers: int, remove: int, pinned: Iterable[int] = (), unit: Unit = "layer", width: int = 1
    ) -> None:
        super().setup(num_layers, remove, pinned, unit, width)
        if self.init == "kl" and unit == "channel":
            raise ConfigError(
                f"policy.init: 'kl' takes a pass for each unit, here {self.units:,}. Accepted for channels: "
                f"salience, uniform."
            )
        self.register_buffer("baseline", torch.tensor(float("nan")))  # no loss seen yet
        with torch.no_grad():
            self.logits.fill_(1.0)
            self.logits[self.free] = self._budget() / (len(self.free) // self.space.groups)

    def _budget(self) -> int:
        """Return how many of the free units to keep (in each group of KV groups or channels)."""
        return (len(self.free) - self.closed) // self.space.groups

    def initialise(self, probe: Probe) -> None:
        if self.init == "uniform":
            return
        # Importance is heavy-tailed, as in the learned mask's own start: take logarithms.
        measure = unit_kl if self.init == "kl" else salience
        score = self.by_group(torch.log(measure(probe, self.units)[self.free].clamp_min(0) + 1e-8))
        z = (score - score.mean(-1, keepdim=True)) / score.std(-1, correction=0, keepdim=True).clamp_min(1e-8)
        with torch.no_grad():
            self.logits[self.free] = shifted(torch.sigmoid(z), self._budget()).flatten().to(self.logits)

    def sample(self, step: int, draw: int) -> Tensor:
        """Flip an independent coin for each unit: gates ``[U]``, 0 or 1, on average ``self.closed`` zeros."""
        with torch.no_grad():  # the projection of the step before; doing it again changes nothing
            self.logits[self.free] = self._projected()
        keep = self.logits.detach()[self.free].cpu()
        gates = torch.ones(self.units, device=self.logits.device)
        gates[self.free] = (torch.rand(len(keep), generator=self.generator(step, draw)) < keep).to(gates)
        return gates

    def surrogate(self, gates_DL: Tensor, losses_D: Tensor, grads_DL: Tensor | None) -> Tensor:
        """Return a scalar whose gradient is the policy gradient of the expected loss in the probabilities.

        The estimate is that of arXiv 2406.10576: the sum over draws of (loss - baseline) times the score,
        divided by draws - 1; ``exact_score`` makes it unbiased. The call also moves the baseline.
        """
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
        keep[self.free] = self._projected().cpu()
        return keep

    def _projected(self) -> Tensor:
        """Return the keep probabilities of the free units, brought to the budget."""
        return project(self.by_group(self.logits.detach()[self.free]), self._budget()).flatten()


def shifted(value_L: Tensor, total: float) -> Tensor:
    """Return ``clip(value - v, 0, 1)``, with v for each row such that the row adds up to ``total``.

    Bisection in float64 finds v.

    Args:
        value_L: ``[..., L]``.
        total: sum of each row.
    """
    value = value_L.double()
    low, high = value.amin(-1, keepdim=True) - 1, value.amax(-1, keepdim=True)
    for _ in range(80):
        v = (low + high) / 2
        above = (value - v).clamp(0, 1).sum(-1, keepdim=True) > total
        low, high = torch.where(above, v, low), torch.where(above, high, v)
    return (value - v).clamp(0, 1).to(value_L)


def project(value_L: Tensor, total: float) -> Tensor:
    """Return the nearest point of ``{s in [0, 1]^L, sum s <= total}`` to each row (arXiv 2406.10576).

    Args:
        value_L: ``[..., L]``.
        total: greatest sum of a row.
    """
    inside = value_L.clamp(0, 1)
    # A sum that the last projection left at the budget, up to rounding, stays to the last bit.
    fits = inside.double().sum(-1, keepdim=True) <= total + 1e-5
    return torch.where(fits, inside, shifted(value_L, total))
