"""Spaces of halves: which halves of layers a mask may keep so that they pair up into layers again.

Unit 2 l is the attention of layer l, unit 2 l + 1 its feed-forward (:mod:`src.units.halves`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

from torch import Tensor

from src.units.spaces import AnyOf, Kept, Space


class Alternating(Space):
    """The space of the sets of halves that pair up into whole layers again.

    In a legal set an attention comes first and a feed-forward last, and the two kinds take turns: new layer
    k has the attention of layer ``i_k`` and the feed-forward of ``j_k``, with ``i_1 <= j_1 < i_2 <= ...``.
    Whole layers are the sets with i = j.
    """

    def allowed(self, unit: Tensor, before: Tensor) -> Tensor:
        return (unit % 2 == before % 2) & (unit >= before)

    def neighbours(self, kept: Kept) -> Iterator[Kept]:
        """Yield each legal set that has one or two removed halves in the place of as many kept ones.

        A single half takes the place of one of its kind: attention or feed-forward. Two removed halves that
        are adjacent in the model, in one layer or in two, take the place of two consecutive kept halves.
        """
        gone = sorted(set(range(self.units)) - set(kept))
        swaps: list[tuple[Kept, Kept]] = [
            ((back,), (out,)) for back in gone for out in kept if (back - out) % 2 == 0
        ]
        beside = [(a, b) for a, b in pairwise(gone) if b == a + 1]
        swaps += [(back, pair) for back in beside for pair in pairwise(kept)]
        for back, out in swaps:
            swapped = sorted({*kept, *back} - {*out})
            if self._chain(swapped):
                yield tuple(swapped)

    def starts(self, scores: Tensor) -> Iterator[Kept]:
        """Yield the best set of whole layers, from which few exchanges lead to good sets of halves."""
        layers = self._layers()
        if len(layers.pinned) > layers.keep:
            return
        yield _both(layers.argmax(scores.reshape(-1, 2).sum(1)).nonzero().flatten().tolist())

    def whole(self) -> Space:
        """Return the space of those sets that are whole layers."""
        return WholeLayers(self.units, self.keep, self.pinned)

    def shorter(self, kept: Kept) -> Iterator[Kept]:
        """Yield each set without two consecutive kept halves, which make up one layer of the cut model."""
        for pair in pairwise(kept):
            if not self.pinned & {*pair}:
                yield tuple(k for k in kept if k not in pair)

    def _layers(self) -> AnyOf:
        """Return the space of the layers that are kept where no pair is recombined."""
        return AnyOf(self.units // 2, self.keep // 2, {unit // 2 for unit in self.pinned})


class WholeLayers(Alternating):
    """The space of those sets of :class:`Alternating` that are whole layers, each with both its halves.

    From one of them to another lead many exchanges of halves, most of which are worse than both. A walk over
    this space first passes them by.
    """

    def legal(self, kept: Iterable[int]) -> bool:
        units = {*kept}
        return super().legal(units) and all(unit ^ 1 in units for unit in units)

    def neighbours(self, kept: Kept) -> Iterator[Kept]:
        """Yield each set that has one removed layer in the place of a kept one."""
        return map(_both, self._layers().neighbours(tuple(unit // 2 for unit in kept[::2])))


def _both(layers: Iterable[int]) -> Kept:
    """Return both halves of each of these layers."""
    return tuple(unit for layer in layers for unit in (2 * layer, 2 * layer + 1))
