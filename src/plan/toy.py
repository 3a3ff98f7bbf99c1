"""Compute a made-up divergence, which costs nothing, in place of that of a real model with removed layers.

It has the traits of a real one. Removing layer i alone costs ``a_i``, heavy-tailed over the layers; two
removed layers cost more together the nearer they are. With ``r = 1 - gates`` the divergence is
``a r + r J r / 2``, where ``J_ij = c sqrt(a_i a_j) rho^|i-j|``. A plan runs a policy on it, to count how many
measurements the policy makes.

Shapes: L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from src.models.prefixes import Front, Prefixes, PrefixMemory
from src.policies.measuring import Measure
from src.policies.walk import Walker

NOTHING = torch.empty(0)
NEIGHBOURS = 1024
"""Largest number of units whose joint costs J are computed; a plan of many channels needs no more."""


class Toy:
    """Computes the made-up divergence of this module.

    Args:
        layers: number of layers L.
        seed: seed of the random costs a.
        spread: standard deviation of the logarithms of the costs.
        strength: c in the formula.
        reach: rho in the formula.
        noise: standard deviation of the logarithms of the factors by which a batch changes the costs.
    """

    def __init__(
        self,
        layers: int,
        seed: int = 0,
        spread: float = 1.0,
        strength: float = 2.0,
        reach: float = 0.5,
        noise: float = 0.5,
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.cost_L = (spread * torch.randn(layers, generator=self.generator)).exp()
        at = torch.arange(min(layers, NEIGHBOURS))
        near_LL = reach ** (at[:, None] - at).abs() * (at[:, None] != at)
        self.near_LL, self.strength, self.noise = strength * near_LL, strength, noise

    def divergence(self, gates_L: Tensor, noisy: bool = False) -> Tensor:
        """Return the divergence under gates, differentiable: that of one noisy batch, or its expectation."""
        cost_L = self.cost_L
        if noisy:
            draw_L = torch.randn(len(cost_L), generator=self.generator)
            cost_L = cost_L * (self.noise * draw_L - self.noise**2 / 2).exp()
        removed_L, root_L = 1 - gates_L, cost_L.sqrt()
        pulled_L = (root_L * removed_L)[: len(self.near_LL)]
        return cost_L @ removed_L + pulled_L @ self.near_LL @ pulled_L / 2


class TooMany(Exception):
    """Says that a policy makes more measurements than a plan counts."""


class CountingProbe(Walker):
    """Gives a policy the divergences of a :class:`Toy`, not of a model, and counts what those would cost.

    Args:
        layers: number of units U.
        batches: number of calibration batches.
        streams: largest number of units' outputs, each for one batch, that the real probe holds at a time.
        limit: largest number of masks measured since :meth:`renew`; beyond it :meth:`walk` raises
            :class:`TooMany`.
        wide: whether every mask runs all layers, as a mask of channels or KV groups does.

    Attributes:
        forward: cost so far, in forward passes of one batch through the whole model. A backward pass counts
            as one more, or as two if it reaches the weights.
    """

    def __init__(
        self, layers: int, batches: int, streams: int = 10**6, limit: int = 20_000, wide: bool = False
    ) -> None:
        super().__init__(batches)
        self.wide = wide
        self.toy, self.layers, self.streams, self.limit = Toy(layers), layers, streams, limit
        self.forward = 0.0
        self.renew()

    def renew(self) -> None:
        """Forget all measurements and streams, as if the probe were new; the count goes on."""
        self._known.clear()
        self._memory, self._signals = PrefixMemory(self.layers, self.streams), set[int]()

    @property
    def memory(self) -> PrefixMemory:
        """Memory of the streams in front of units, as a real probe's, with empty tensors in their place."""
        return self._memory

    def walk(
        self, masks: Sequence[Tensor], about: str, by: Measure = "divergence", quick: bool = False
    ) -> list[float]:
        """Return the toy's divergence under each mask, whatever the measure; count what real ones would cost.

        Raises:
            TooMany: with these, more masks are measured than the limit.
        """
        if len(self._known) // self.batches + len(masks) > self.limit:
            raise TooMany
        return super().walk(masks, about, by, quick)

    def run(self, batch: int, gates: Front, by: Measure, prefixes: Prefixes) -> float:
        """Return the toy's divergence under ``gates``, and count the layers that a real pass would run."""
        if batch not in self._signals:
            self._signals.add(batch)
            self._count((1.0,) * self.layers, prefixes)
        self._count(gates, prefixes)
        return float(self.toy.divergence(torch.tensor(gates)))

    def _count(self, gates: Front, prefixes: Prefixes) -> None:
        """Count the layers that a real pass under these gates would run."""
        if self.wide:
            self.forward += 1.0
            return
        prefixes.begin(gates)
        for unit in range(prefixes.start, self.layers):
            prefixes.stream(unit, NOTHING)
            self.forward += (gates[unit] > 0) / self.layers

    def average(self, sums: Sequence[float]) -> float:
        """Return the first value: the toy has one for all batches."""
        return sums[0]

    def mean(self, sums: Tensor, counts: Tensor) -> Tensor:
        """Return ``sums / counts``, as there is one rank."""
        return sums / counts

    def states(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one batch of noise as streams of all layers, and count the passes that real ones take."""
        self.forward += self.batches
        yield torch.randn(self.layers + 1, 1, 4, 8), torch.ones(1, 4, dtype=torch.bool)

    def finals(self, gates_L: Tensor | None) -> Iterator[Tensor]:
        """Yield one state, as far from that of open gates as the toy's divergence; count the real passes."""
        gates_L = torch.ones(self.layers) if gates_L is None else gates_L
        self.forward += self.batches * (1.0 if self.wide else float((gates_L > 0).float().mean()))
        yield self.toy.divergence(gates_L).sqrt()[None, None]

    def gate_gradients(self) -> Tensor:
        """Return noise ``[B, U]``, and count the forward and backward passes."""
        self.forward += 2 * self.batches
        return torch.randn(self.batches, self.layers, dtype=torch.float64)

    def activations(self) -> Tensor:
        """Return noise ``[U]``, and count the forward passes."""
        self.forward += self.batches
        return torch.rand(self.layers)

    def weights(self) -> Iterator[tuple[int, str, nn.Parameter]]:
        """Yield no weights: reading them costs no pass."""
        return iter(())

    def share(self, layer: int, name: str, values: Tensor) -> Tensor:
        """Return the sum of all values ``[1]``, as if each layer had one unit."""
        return values.sum()[None]

    def gradients(self, visit: Callable[[int, nn.Module], None]) -> None:
        """Call ``visit`` on layers that have noise as gradients, and count the passes that real ones take."""
        self.forward += 3 * self.batches
        for layer in range(self.layers):
            module = nn.Linear(2, 2)
            for p in module.parameters():
                p.grad = torch.randn_like(p)
            visit(layer, module)
