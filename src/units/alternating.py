"""Spaces of halves: which halves of layers a mask may keep so that they pair up into layers again.

Unit 2 l is the attention of layer l, unit 2 l + 1 its feed-forward (:mod:`src.units.halves`).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from src.units.spaces import AnyOf, Kept, Layerwise, Space


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
        if whole := self.layerwise():
            kept = whole.space.argmax(scores.reshape(-1, 2).sum(1)).nonzero().flatten().tolist()
            yield whole.halves(tuple(kept))

    def layerwise(self) -> Layerwise | None:
        """Return the sets that are whole layers, as sets of layers; None if more are pinned than may stay."""
        layers = AnyOf(self.units // 2, self.keep // 2, {unit // 2 for unit in self.pinned})
        return None if len(layers.pinned) > layers.keep else Layerwise(layers, both_halves, whole_layers)

    def shorter(self, kept: Kept) -> Iterator[Kept]:
        """Yield each set without two consecutive kept halves, which make up one layer of the cut model."""
        for pair in pairwise(kept):
            if not self.pinned & {*pair}:
                yield tuple(k for k in kept if k not in pair)


def both_halves(layers: Kept) -> Kept:
    """Return both halves of each of these layers."""
    return tuple(unit for layer in layers for unit in (2 * layer, 2 * layer + 1))


def whole_layers(halves: Kept) -> Kept | None:
    """Return the layers of which these are both halves, or None if they have one half of some layer."""
    layers = tuple(unit // 2 for unit in halves[::2])
    return layers if both_halves(layers) == halves else None
