"""A movable window over depth, after the concave gate of CLP, "The Structural Scalpel" (arXiv 2510.23652).

The abstract names a differentiable concave gate that finds the contiguous segment to cut, and gives no
formula: **this gate is our reconstruction**. Each segment is a hat, concave in depth and highest at its
middle; the removed share of a layer is a sigmoid of its height above a water level, and the level is solved
for, so that exactly n layers are removed at every temperature. A window of fixed level loses mass at the ends
of the model, where it then looks falsely cheap; this one does not. The other half of CLP, tuning the blocks
next to the cut, is the scope ``cut_adjacent`` of the recovery (``configs/recover/clp.yaml``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from src.errors import ConfigError
from src.mask import Unit
from src.policies.base import MaskPolicy, Probe
from src.ranges import Count, Positive, checked


class ConcaveGate(MaskPolicy):
    """Learns the places of contiguous segments; anneal the temperature from about 2 layers to 0.05.

    Contiguous means among the layers that may be removed. Gates are deterministic: one draw is enough.

    Args:
        segments: how many segments share the layers to remove, in lengths as equal as can be.
        start: where learning starts: ``scan`` measures segments at every half length on quick calibration
            rows and takes the best; ``random`` takes one from the seed.
        temperature: softness of the segments' edges, in layers; a callback anneals it.
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

    def setup(self, num_layers: int, remove: int, pinned: Iterable[int] = (), unit: Unit = "layer") -> None:
        super().setup(num_layers, remove, pinned, unit)
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
            costs = [probe.divergence(self.gates(self._without([*chosen, s])), quick=True) for s in tried]
            chosen.append(tried[costs.index(min(costs))])
        self.place(chosen)

    def place(self, starts: list[int]) -> None:
        """Put the segments' first layers, counted among the free layers, exactly there."""
        rooms = [len(self.free) - length + 1 for length in lengths(self.target, self.segments)]
        share = torch.tensor([(s + 0.5) / room for s, room in zip(starts, rooms, strict=True)])
        with torch.no_grad():
            self.logits.copy_(torch.logit(share))

    def _starts(self, count: int) -> Tensor:
        """First layer of each segment, a float64 that rounds to 0..(free layers - length)."""
        sizes = torch.tensor(lengths(count, self.segments))
        return (len(self.free) - sizes + 1) * torch.sigmoid(self.logits.cpu().double()) - 0.5

    def _without(self, starts: list[int] | Tensor) -> tuple[int, ...]:
        """The kept layers when the first segments, at these places, are removed."""
        sizes = lengths(self.target, self.segments)[: len(starts)]
        heights = hats(len(self.free), torch.as_tensor(starts), torch.tensor(sizes))
        gone = heights.sort(descending=True, stable=True).indices[: sum(sizes)]
        removed = {self.free[i] for i in gone.tolist()}
        return tuple(i for i in range(self.num_layers) if i not in removed)

    def sample(self, step: int, draw: int) -> Tensor:
        """Relaxed gates ``[L]`` in [0, 1] whose complements add up to the layers to remove."""
        sizes = torch.tensor(lengths(self.remove, self.segments))
        heights = hats(len(self.free), self._starts(self.remove), sizes)
        gates = torch.ones(self.num_layers, device=self.logits.device)
        gates[self.free] = (1 - flood(heights, self.remove, self.temperature)).to(gates)
        return gates

    def harden(self) -> tuple[int, ...]:
        """All layers but the highest of the hats: for one segment, the window at the nearest start."""
        return self._without(self._starts(self.target).detach())

    def worth(self) -> list[float]:
        """The keep probabilities: the logits are not one for each layer."""
        return self.keep_probabilities().tolist()

    @torch.no_grad()
    def keep_probabilities(self) -> Tensor:
        return self.sample(0, 0).cpu()


def lengths(count: int, segments: int) -> list[int]:
    """Divide ``count`` layers among the segments, longer ones first."""
    return [count // segments + (j < count % segments) for j in range(segments)]


def hats(size: int, starts_S: Tensor, lengths_S: Tensor) -> Tensor:
    """Return the height ``[size]`` of each layer above the edge of its nearest segment; negative outside."""
    middle_S = starts_S + (lengths_S - 1) / 2
    distance_SL = (torch.arange(size) - middle_S[:, None]).abs()
    return (lengths_S[:, None] / 2 - distance_SL).amax(0)


def flood(height_L: Tensor, count: int, tau: float) -> Tensor:
    """Return ``sigmoid((height - level) / tau)`` at the level where they add up to ``count``, differentiable.

    The level is found by bisection; its implicit gradient is that of one Newton step from there.
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
