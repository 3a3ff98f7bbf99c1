"""Every mask there is: the true optimum on the calibration rows, for shallow models."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from tqdm import tqdm

from src.errors import ConfigError
from src.policies.base import Probe
from src.policies.one_shot import OneShot
from src.policies.random_search import best_of
from src.ranges import Count, checked


class Exhaustive(OneShot):
    """Measures all masks of the exact count by divergence and takes the best.

    Args:
        limit: number of masks above which it refuses.
        kwargs: ``always_keep``, ``seed``, ``candidates``, ``polish`` of the base class.
    """

    @checked
    def __init__(self, limit: Count = 10_000, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.limit = limit

    def setup(self, num_layers: int, remove: int, pinned: Iterable[int] = ()) -> None:
        super().setup(num_layers, remove, pinned)
        self.count = math.comb(len(self.free), remove)
        if self.count > self.limit:
            raise ConfigError(
                f"policy.limit: {remove} of {len(self.free)} layers are {self.count:,} masks, above the "
                f"limit of {self.limit:,}. Remove fewer layers, name more in policy.always_keep, raise the "
                f"limit, or choose another policy, such as src.policies.RandomSearch."
            )

    def score(self, probe: Probe) -> Tensor:
        """The best mask's gates ``[L]``."""
        gone = itertools.combinations(self.free, self.target)
        masks = (tuple(i for i in range(self.num_layers) if i not in set(out)) for out in gone)
        shown = tqdm(masks, "all masks", self.count, disable=getattr(rank_zero_only, "rank", 0) != 0)
        return self.gates(best_of(shown, lambda keep: probe.divergence(self.gates(keep))))
