"""L0 gates, with Lagrange multipliers on their number, as in Sheared-LLaMA (arXiv 2310.06694).

Each unit has a hard concrete gate (arXiv 1712.01312): a binary concrete variable, stretched and clipped, so a
forward pass sees values in [0, 1], many of them exactly 0 or 1. The multipliers drive the expected number of
open gates to the number of units to keep. The count is met in expectation only; hardening takes the exact
count by the log-alphas, the parameters of the gates. Weights stay frozen here, while Sheared-LLaMA trains
them along with the gates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from src.mask import Unit
from src.policies.base import MaskPolicy
from src.ranges import Finite, checked

TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1
"""Temperature of the concrete variable, and the interval it is stretched to (as in arXiv 1712.01312)."""


class HardConcrete(MaskPolicy):
    """Learns the log-alpha of each gate (``logits``) and two Lagrange multipliers, by descent and ascent.

    The loss gains ``m_1 d + m_2 d^2``; d is the expected number of open gates less the number of units to
    keep. Under :class:`src.callbacks.PruningCurriculum` the number to remove rises, as in Sheared-LLaMA. One
    optimiser steps both kinds of parameters. Their gradients differ in scale, so use one that adapts to each
    coordinate, such as Adam.

    Args:
        log_alpha: start of the log-alphas. At 2 a unit is open with probability 0.97 (our choice).
        kwargs: ``always_keep``, ``seed``, ``candidates``, ``polish`` of the base class.
    """

    works_on = ("layer", "half", "kv_group", "channel")

    @checked
    def __init__(self, log_alpha: Finite = 2.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.log_alpha = log_alpha

    def setup(
        self, num_layers: int, remove: int, pinned: Iterable[int] = (), unit: Unit = "layer", width: int = 1
    ) -> None:
        super().setup(num_layers, remove, pinned, unit, width)
        with torch.no_grad():
            self.logits[self.free] = self.log_alpha
        groups = self.space.groups  # of units of width the number is met in each layer
        self.multipliers = nn.Parameter(torch.zeros(2, groups).squeeze(-1))

    def sample(self, step: int, draw: int) -> Tensor:
        """Return relaxed gates ``[U]`` in [0, 1]; the units that may not go are open."""
        u = torch.rand(len(self.free), generator=self.generator(step, draw)).clamp(1e-6, 1 - 1e-6)
        noise = (torch.log(u) - torch.log1p(-u)).to(self.logits)
        concrete = torch.sigmoid((noise + self.logits[self.free]) / TEMPERATURE)
        gates = torch.ones(self.units, device=self.logits.device)
        gates[self.free] = (concrete * (HIGH - LOW) + LOW).clamp(0, 1)
        return gates

    def open_probabilities(self) -> Tensor:
        """Return the probability ``[F]`` that the gate of each free unit is above zero (arXiv 1712.01312)."""
        return torch.sigmoid(self.logits[self.free] - TEMPERATURE * math.log(-LOW / HIGH))

    def surrogate(self, gates_DL: Tensor, losses_D: Tensor, grads_DL: Tensor | None) -> Tensor:
        opened = self.by_group(self.open_probabilities())
        excess = opened.sum(-1) - (len(self.free) - self.closed) / len(opened)
        # Value of the multipliers, negated gradient: the optimiser's descent is their ascent.
        rising = 2 * self.multipliers.detach() - self.multipliers
        pathwise = super().surrogate(gates_DL, losses_D, grads_DL)
        return pathwise + (rising[0] * excess + rising[1] * excess**2).sum()

    def keep_probabilities(self) -> Tensor:
        keep = torch.ones(self.units)
        keep[self.free] = self.open_probabilities().detach().cpu()
        return keep
