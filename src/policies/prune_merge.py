"""Prune and Merge: two thresholds on a gradient-weighted score, here of gates (arXiv 2503.23455).

*The paper's*: tokens of a vision transformer. The score of a token is ``|sum of A dLoss/dA|``, where A is the
attention that it gets; the sum over a batch, its heads and queries comes before the absolute value. The
tokens of the lowest scores are pruned, those of the highest are centres, and each between the two thresholds
is merged into its nearest centre, by a matrix in front of each block that another behind it undoes.
*Ours*: a gate in the place of A. Units below the lower threshold go, those above the upper stay. Between them
the score does not decide but a measurement does, as no plain model holds a layer that two were merged into.
Its token axis is :mod:`src.vision.tokens`: a causal decoder reads its cache at the positions of all tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from src.policies.measuring import Probe
from src.policies.one_shot import OneShot
from src.policies.scores import salience
from src.ranges import Share, checked


class PruneMerge(OneShot):
    """Removes units of a low score at once, and of the middle ones those whose absence is seen least.

    Args:
        prune: share of all units that go by their score alone; at most as many as shall go.
        keep: share of all units that stay by their score alone; at most as many as shall stay.
        kwargs: ``always_keep``, ``seed``, ``candidates``, ``polish`` of the base class.
    """

    works_on = ("layer", "half")

    @checked
    def __init__(self, prune: Share = 0.1, keep: Share = 0.6, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.prune, self.keep = prune, keep

    def score(self, probe: Probe) -> Tensor:
        """Return the place ``[U]`` of each unit in the order in which they go.

        A middle unit has its place by the divergence of the model without it and without the pruned units.
        """
        order = sorted(self.free, key=salience(probe, self.units).tolist().__getitem__)
        low = min(self.closed, round(self.prune * self.units))
        high = max(self.closed, len(order) - round(self.keep * self.units))
        if low < self.closed < high:
            pruned, middle = order[:low], order[low:high]
            masks = [self.gates({*range(self.units)} - {*pruned, unit}) for unit in middle]
            values = probe.walk(masks, "units between the thresholds", quick=True)
            rises = [math.inf if math.isnan(value) else value for value in values]
            order[low:high] = [unit for _, unit in sorted(zip(rises, middle, strict=True))]
        place_U = torch.full((self.units,), float(self.units))
        place_U[order] = torch.arange(float(len(order)))
        return place_U
