"""The space of masks that keep as many units in each of several groups, such as the channels of each layer.

The groups are chosen alike and apart: the law of the whole is the product of the laws of the groups. The
tables of :class:`src.units.spaces.Space` take the groups as a leading dimension.

Shapes: G groups, W units in each, U = G W units, group after group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product

import torch
from torch import Tensor

from src.units.spaces import Kept, Space


class InEach(Space):
    """A set of one space in each of several groups.

    Args:
        groups: number of groups.
        each: space of the sets of one group.
    """

    def __init__(self, groups: int, each: Space) -> None:
        pinned = [group * each.units + unit for group in range(groups) for unit in each.pinned]
        super().__init__(groups * each.units, groups * each.keep, pinned)
        self.groups, self.each = groups, each

    def holding(self, units: Iterable[int]) -> Space:
        """The part of this space whose sets keep these units besides: of a group alone it is no space.

        Raises:
            NotImplementedError: there are such units.
        """
        if [*units]:
            raise NotImplementedError("groups are chosen alike")
        return self

    def neighbours(self, kept: Kept) -> Iterator[Kept]:
        """A neighbour of one group's set in its place."""
        parts = self._parts(kept)
        for group, part in enumerate(parts):
            for near in self.each.neighbours(part):
                yield self._joined([*parts[:group], near, *parts[group + 1 :]])

    def shorter(self, kept: Kept) -> Iterator[Kept]:
        """One unit less in each group."""
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
