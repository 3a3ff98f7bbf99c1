"""Learn the place of a contiguous run of layers, after the concave gate of CLP (arXiv 2510.23652).

CLP's abstract ("The Structural Scalpel") names a differentiable concave gate that finds the contiguous
segment to remove. It gives no formula, so **this gate is our reconstruction**. A segment of length m with its
middle at depth c gives layer l the height ``m / 2 - |l - c|``, a concave function of depth. The removed share
of a layer is ``sigmoid((height - level) / temperature)``. The level is solved for, so that the shares add up
to exactly n at every temperature. With a fixed level, a segment that reaches over an end of the model would
remove less than n there, and would look better than it is.

The other half of CLP, training the blocks next to the gap, is the scope ``cut_adjacent`` of a recovery
(``configs/recover/clp.yaml``).

Shapes: L layers, S segments.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from src.errors import ConfigError
from src.mask import Unit
from src.policies.base import MaskPolicy
from src.policies.measuring import Probe
from src.ranges import Count, Positive, checked
from src.units.spaces import Kept


class ConcaveGate(MaskPolicy):
    """Learns the places of contiguous segments of layers to remove, one number for each.

    A segment skips layers that may not be removed: it is contiguous among the others. The gates are
    deterministic, so one draw a step is enough. A callback should anneal the temperature from about 2 layers
    to 0.05.

    Args:
        segments: number of segments; the layers to remove are divided among them as equally as possible.
        start: first place of the segments. ``scan`` measures places half a length apart on a part of the
            calibration rows and takes the best; ``random`` draws one from the seed.
        temperature: width of the segments' soft edges, in layers.
        kwargs: ``always_keep``, ``seed``, ``candidates``, ``polish`` of the base class.
    """

    @checked
    def __init__(
        self,
        segments: Count = 1,
        start: Literal["scan", "random"] = "scan",
        temperature: Positive = 2.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.segments, self.start, self.temperature = segments, start, temperature

    def setup(
        self, num_layers: int, remove: int, pinned: Iterable[int] = (), unit: Unit = "layer", width: int = 1
    ) -> None:
        super().setup(num_layers, remove, pinned, unit, width)
        if not 1 <= self.segments <= remove:
            raise ConfigError(
                f"policy.segments: {self.segments} asked for {remove} layers. Accepted: 1 to {remove}."
            )
        self.logits = nn.Parameter(torch.zeros(self.segments))  # a place for each segment, not for each layer

    def initialise(self, probe: Probe) -> None:
        chosen: list[int] = []
        for number, length in enumerate(lengths(self.target, self.segments)):
            last = len(self.free) - length
            if self.start == "random":
                chosen.append(int(torch.randint(last + 1, (), generator=self.generator(0, number))))
                continue
            tried = sorted({*range(0, last, max(1, length // 2)), last})
            masks = [self.gates(self._without([*chosen, start])) for start in tried]
            costs = probe.walk(masks, "places of a segment", quick=True)
            chosen.append(tried[costs.index(min(costs))])
        self.place(chosen)

    def place(self, starts: list[int]) -> None:
        """Move the segments to the given places.

        Args:
            starts: first layer of each segment, counted among the layers that may be removed.
        """
        rooms = [len(self.free) - length + 1 for length in lengths(self.target, self.segments)]
        share = torch.tensor([(s + 0.5) / room for s, room in zip(starts, rooms, strict=True)])
        with torch.no_grad():
            self.logits.copy_(torch.logit(share))

    def _starts(self, count: int) -> Tensor:
        """Return where each segment's first layer is now, ``[S]`` float64; rounded, it is a legal place."""
        sizes = torch.tensor(lengths(count, self.segments))
        return (len(self.free) - sizes + 1) * torch.sigmoid(self.logits.cpu().double()) - 0.5

    def _without(self, starts: list[int] | Tensor) -> Kept:
        """Return the kept layers after the first ``len(starts)`` segments are removed at these places."""
        sizes = lengths(self.target, self.segments)[: len(starts)]
        height_L = heights(len(self.free), torch.as_tensor(starts), torch.tensor(sizes))
        gone = height_L.sort(descending=True, stable=True).indices[: sum(sizes)]
        removed = {self.free[i] for i in gone.tolist()}
        return tuple(i for i in range(self.num_layers) if i not in removed)

    def sample(self, step: int, draw: int) -> Tensor:
        """Return relaxed gates ``[L]`` in [0, 1]; what they lack to 1 adds up to the number to remove."""
        sizes = torch.tensor(lengths(self.remove, self.segments))
        height_L = heights(len(self.free), self._starts(self.remove), sizes)
        gates = torch.ones(self.num_layers, device=self.logits.device)
        gates[self.free] = (1 - removed_shares(height_L, self.remove, self.temperature)).to(gates)
        return gates

    def harden(self) -> Kept:
        """Return all layers but the n of greatest height: with one segment, a run at the nearest place."""
        return self._without(self._starts(self.target).detach())

    def worth(self) -> list[float]:
        """Return the keep probabilities, because the logits belong to segments, not to layers."""
        return self.keep_probabilities().tolist()

    @torch.no_grad()
    def keep_probabilities(self) -> Tensor:
        return self.sample(0, 0).cpu()


def lengths(count: int, segments: int) -> list[int]:
    """Return the lengths of the segments among which ``count`` layers are divided, longer ones first."""
    return [count // segments + (j < count % segments) for j in range(segments)]


def heights(size: int, starts_S: Tensor, lengths_S: Tensor) -> Tensor:
    """Return the height of each layer ``[size]``: how far it lies inside its segment; negative outside.

    Of several segments it is the greatest height.

    Args:
        size: number of layers that may be removed.
        starts_S: first layer of each segment; need not be whole.
        lengths_S: number of layers of each segment.
    """
    middle_S = starts_S + (lengths_S - 1) / 2
    distance_SL = (torch.arange(size) - middle_S[:, None]).abs()
    return (lengths_S[:, None] / 2 - distance_SL).amax(0)


def removed_shares(height_L: Tensor, count: int, tau: float) -> Tensor:
    """Return the removed share of each layer, ``sigmoid((height - level) / tau)`` ``[L]``.

    The level is the one at which the shares add up to ``count``. Bisection finds it without gradients. One
    Newton step from there makes it differentiable in the heights (implicit function theorem).

    Args:
        height_L: height of each layer, see :func:`heights`.
        count: number of layers to remove.
        tau: temperature, in layers.
    """
    with torch.no_grad():
        low, high = height_L.min() - 60 * tau, height_L.max() + 60 * tau
        for _ in range(80):
            level = (low + high) / 2
            above = torch.sigmoid((height_L - level) / tau).sum() > count
            low, high = torch.where(above, level, low), torch.where(above, high, level)
        share = torch.sigmoid((height_L - level) / tau)
        slope = (share * (1 - share)).sum().clamp_min(torch.finfo(share.dtype).tiny) / tau
    level = level + (torch.sigmoid((height_L - level) / tau).sum() - count) / slope
    return torch.sigmoid((height_L - level) / tau)
