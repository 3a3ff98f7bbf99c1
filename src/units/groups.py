"""The space of masks that keep equally many units in each group, such as the channels of each layer.

Every group obeys the same rule, and is chosen independently of the others: the probability of a mask is the
product of those of its groups. So the computations of :class:`src.units.spaces.Space` serve all groups at
once, with the groups as a leading dimension.

Shapes: G groups, W units in each, U = G W units, group after group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product

import torch
from torch import Tensor

from src.units.spaces import Kept, Space


class InEach(Space):
    """Sets of units that consist of one legal set of the space ``each`` in every group.

    Args:
        groups: number of groups, G.
        each: space of the sets of one group, of W units.
    """

    def __init__(self, groups: int, each: Space) -> None:
        pinned = [group * each.units + unit for group in range(groups) for unit in each.pinned]
        super().__init__(groups * each.units, groups * each.keep, pinned)
        self.groups, self.each = groups, each

    def holding(self, units: Iterable[int]) -> Space:
        """Return this space if there is nothing to add to what its sets keep.

        A unit of one group alone cannot be added, since the groups would then differ in their rule.

        Raises:
            NotImplementedError: units are given.
        """
        if [*units]:
            raise NotImplementedError("groups are chosen alike")
        return self

    def neighbours(self, kept: Kept) -> Iterator[Kept]:
        """Yield each legal set that differs from ``kept`` in one group, by one exchange there."""
        parts = self._parts(kept)
        for group, part in enumerate(parts):
            for near in self.each.neighbours(part):
                yield self._joined([*parts[:group], near, *parts[group + 1 :]])

    def shorter(self, kept: Kept) -> Iterator[Kept]:
        """Yield each set with one unit less in every group."""
        return map(self._joined, product(*(self.each.shorter(part) for part in self._parts(kept))))

    def size(self) -> int:
        return int(self.each.size() ** self.groups)

    def legal(self, kept: Iterable[int]) -> bool:
        rising = sorted(kept)
        inside = all(0 <= unit < self.units for unit in rising)
        return inside and all(self.each.legal(part) for part in self._parts(rising))

    def __iter__(self) -> Iterator[Kept]:
        return map(self._joined, product(self.each, repeat=self.groups))

    def argmax(self, scores: Tensor) -> Tensor:
        return self.each.argmax(self._split(scores)).flatten(-2)

    def log_total(self, theta: Tensor) -> Tensor:
        return self.each.log_total(self._split(theta)).sum(-1)

    def marginals(self, theta: Tensor) -> Tensor:
        return self.each.marginals(self._split(theta)).flatten(-2)

    def draw(self, theta: Tensor, generator: torch.Generator) -> Tensor:
        return self.each.draw(self._split(theta), generator).flatten(-2)

    def uniform(self, generator: torch.Generator) -> Kept:
        return self._joined([self.each.uniform(generator) for _ in range(self.groups)])

    def _split(self, theta: Tensor) -> Tensor:
        return theta.reshape(*theta.shape[:-1], self.groups, self.each.units)

    def _parts(self, kept: Iterable[int]) -> list[Kept]:
        parts: list[list[int]] = [[] for _ in range(self.groups)]
        for unit in kept:
            parts[unit // self.each.units].append(unit % self.each.units)
        return [tuple(part) for part in parts]

    def _joined(self, parts: Iterable[Kept]) -> Kept:
        return tuple(group * self.each.units + unit for group, part in enumerate(parts) for unit in part)
