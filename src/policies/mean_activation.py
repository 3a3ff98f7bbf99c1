"""Minitron's width criterion (arXiv 2407.14679): drop the units whose activations are smallest."""

from __future__ import annotations

from torch import Tensor

from src.policies.measuring import Probe
from src.policies.one_shot import OneShot


class MeanActivation(OneShot):
    """Scores a KV group or a channel by the mean absolute value of what it hands to the stream's writer.

    Of a KV group it is the sum over its columns. It takes one forward pass; no gradient is needed.

    Args:
        kwargs: ``seed``, ``candidates``, ``polish`` of the base class.
    """

    works_on = ("kv_group", "channel")
    any_count = True

    def score(self, probe: Probe) -> Tensor:
        return probe.activations()
