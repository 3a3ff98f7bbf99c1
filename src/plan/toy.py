"""A divergence that costs nothing: removing layers of a made-up model, with the traits of the real one.

Removing layer i alone costs ``a_i``, heavy-tailed over the layers; two removed layers cost more together the
nearer they are. With ``r = 1 - gates`` the divergence is ``a r + r J r / 2``, ``J_ij = c sqrt(a_i a_j)
rho^|i-j|``. Plans count with it what a policy measures, and ``scripts/scale.py`` how long one learns.

Shapes: L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


class Toy:
    """Computes the made-up divergence of this module.

    Args:
        layers: number of layers L.
        seed: of the random costs a.
        spread: standard deviation of the logarithms of the costs.
        strength: c in the formula.
        reach: rho in the formula.
        noise: standard deviation of the logarithm of a batch's factors on the costs.
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
        at = torch.arange(layers)
        near_LL = reach ** (at[:, None] - at).abs() * (at[:, None] != at)
        self.near_LL, self.strength, self.noise = strength * near_LL, strength, noise

    def divergence(self, gates_L: Tensor, noisy: bool = False) -> Tensor:
        """Return the divergence under gates, differentiable: that of one noisy batch, or its expectation."""
        cost_L = self.cost_L
        if noisy:
            draw_L = torch.randn(len(cost_L), generator=self.generator)
            cost_L = cost_L * (self.noise * draw_L - self.noise**2 / 2).exp()
        removed_L, root_L = 1 - gates_L, cost_L.sqrt()
        pulled_L = root_L * removed_L
        return cost_L @ removed_L + pulled_L @ self.near_LL @ pulled_L / 2


class TooMany(Exception):
    """A policy makes more measurements than a plan counts."""


class CountingProbe:
    """A probe that answers a policy with a toy's values, and counts what real measurements would cost.

    Args:
        layers: number of layers L.
        batches: calibration batches.
        limit: most measurements that are counted; one more raises :class:`TooMany`.

    Attributes:
        forward: passes of one batch through the whole model so far; a backward pass counts as one more.
    """

    def __init__(self, layers: int, batches: int, limit: int = 100_000) -> None:
        self.toy, self.layers, self.batches, self.limit = Toy(layers), layers, batches, limit
        self.forward, self._known = 0.0, dict[tuple[object, ...], float]()
        self.signals()

    def signals(self) -> None:
        """Count the teacher's pass over all batches, which a probe makes first."""
        self.forward += self.batches

    def divergence(self, gates_L: Tensor, quick: bool = False) -> float:
        """Return the toy's divergence, and count the passes of a real one."""
        return self._measure(gates_L, quick, "kl")

    def cross_entropy(self, gates_L: Tensor) -> float:
        """Return the toy's divergence in place of a cross-entropy, and count its passes."""
        return self._measure(gates_L, False, "ce")

    def _measure(self, gates_L: Tensor, quick: bool, what: str) -> float:
        key = (what, quick, tuple(gates_L.tolist()))
        if key not in self._known:
            if len(self._known) == self.limit:
                raise TooMany
            open_share = float((gates_L > 0).sum()) / self.layers
            self.forward += open_share * (math.ceil(self.batches / 4) if quick else self.batches)
            self._known[key] = float(self.toy.divergence(gates_L.detach().cpu()))
        return self._known[key]

    def mean(self, sums: Tensor, counts: Tensor) -> Tensor:
        """Return ``sums / counts``: a plan has one rank."""
        return sums / counts

    def states(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one batch of noise of the right shape, and count the passes of a real stream."""
        self.forward += self.batches
        yield torch.randn(self.layers + 1, 1, 4, 8), torch.ones(1, 4, dtype=torch.bool)

    def gradients(self, visit: Callable[[int, nn.Module], None]) -> None:
        """Visit layers with noise as gradients, and count the passes of real ones."""
        self.forward += 3 * self.batches
        for layer in range(self.layers):
            module = nn.Linear(2, 2)
            for p in module.parameters():
                p.grad = torch.randn_like(p)
            visit(layer, module)
