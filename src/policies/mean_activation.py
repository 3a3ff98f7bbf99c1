"""Minitron's width criterion (arXiv 2407.14679): remove the units whose activations are smallest."""

from __future__ import annotations

from torch import Tensor

from src.policies.measuring import Probe
from src.policies.one_shot import OneShot


class MeanActivation(OneShot):
    """Scores a KV group or a channel by the mean absolute activation that goes into its output projection.

    That map writes to the residual stream: a channel is one of its inputs, and of a KV group all inputs are
    added up. It takes one forward pass and no gradient, and ``seed``, ``candidates`` and ``polish`` as the
    base class does.
    """

    works_on = ("kv_group", "channel")
    any_count = True

    def score(self, probe: Probe) -> Tensor:
        return probe.activations()
