"""Which sets of units a mask may keep; the best of them by score, the probability of each unit, exact draws.

A unit is a layer, half of one, or a part of its width; its kind says what removing it does to a model. A
space knows numbers only: ``units`` of them in order of computation, of which each legal set keeps ``keep``.
All sets of a space have one size, so all its cuts cost the same.

============ =============================== ==============================================================
space        units                           legal
============ =============================== ==============================================================
AnyOf        layers, or the width of a layer any ``keep`` of them
Alternating  2 L halves of L layers          attention, feed-forward, attention, feed-forward, ... in order
============ =============================== ==============================================================

The second is in :mod:`src.units.alternating`.

Logits theta, one for each unit, define a distribution over the legal sets:
``P(S) ~ exp(sum of theta over S)``. It is uniform at theta = 0, and concentrates on the best set as theta
grows. Gumbel noise on theta followed by :meth:`Space.argmax` is perturb-and-MAP (Papandreou and Yuille, ICCV
2011); in ``AnyOf`` it is the Gumbel-TopK draw.

Every computation is dynamic programming over (unit, number of units kept before it), with one step for each
unit, in float64: exact, however many sets there are.

Shapes: U units, K = ``keep``, M = K + 1 (none to all of them kept); ``...`` are groups that are chosen
independently by the same rule, such as the layers whose channels are the units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

NEVER = -1e200
"""Logarithm of zero, below any score. Finite, because infinity has no second derivative."""

TABULATED = 512
"""Most units whose probabilities are computed exactly, by a table of their number squared in each group."""

Kept = tuple[int, ...]
"""Units that stay, rising."""


class Layerwise(NamedTuple):
    """Those sets of a space of halves that are whole layers.

    Attributes:
        space: the same sets, with layers as units.
        halves: both halves of each of some layers.
        layers: the layers of which a set has both halves, or None if it has one half of some layer.
    """

    space: Space
    halves: Callable[[Kept], Kept]
    layers: Callable[[Kept], Kept | None]


class Space:
    """The legal sets of units, where a unit may be kept or not depending on how many before it are kept.

    A subclass says by :meth:`allowed` which sets are legal.

    Args:
        units: number of units, U.
        keep: number of units in each set, K.
        pinned: units that are in each set.

    Attributes:
        groups: number of groups that are chosen independently; see :class:`src.units.groups.InEach`.
    """

    groups = 1

    def __init__(self, units: int, keep: int, pinned: Iterable[int] = ()) -> None:
        self.units, self.keep, self.pinned = units, keep, frozenset(pinned)

    @cached_property
    def may_UK(self) -> Tensor:
        """Whether unit u may be kept when exactly k units before it are: bool ``[U, K]``, k = 0 ... K - 1."""
        return self.allowed(torch.arange(self.units)[:, None], torch.arange(self.keep)[None])

    def allowed(self, unit: Tensor, before: Tensor) -> Tensor:
        """Return whether ``unit`` may be kept when ``before`` units in front of it are; both broadcast."""
        raise NotImplementedError

    def holding(self, units: Iterable[int]) -> Space:
        """Return the space of those sets of this one that also keep ``units``."""
        return type(self)(self.units, self.keep, self.pinned | {*units})

    def neighbours(self, kept: Kept) -> Iterator[Kept]:
        """Yield each legal set that differs from ``kept`` by one exchange of kept for removed units."""
        raise NotImplementedError

    def shorter(self, kept: Kept) -> Iterator[Kept]:
        """Yield the legal sets that remain of ``kept`` after one removal, with all pinned units.

        One removal takes as little as leaves a legal set: a unit, two consecutive kept halves, or a unit in
        each group.
        """
        raise NotImplementedError

    def starts(self, scores: Tensor) -> Iterator[Kept]:
        """Yield further legal sets at which a search over neighbours may start; none by default.

        Args:
            scores: ``[U]``, by which such sets are found; high is worth keeping.
        """
        return iter(())

    def layerwise(self) -> Layerwise | None:
        """Return the sets that are whole layers, as sets of layers, if units are halves; else None."""
        return None

    # ------------------------------------------------------------------ counting

    def size(self) -> int:
        """Return the number of legal sets."""
        ways = [1] + [0] * self.keep
        for unit, may in enumerate(self.may_UK.tolist()):
            kept = [0, *(before * ok for before, ok in zip(ways, may, strict=False))]
            ways = kept if unit in self.pinned else [a + b for a, b in zip(ways, kept, strict=True)]
        return ways[-1]

    def legal(self, kept: Iterable[int]) -> bool:
        """Return whether these units are one of the legal sets."""
        return len(rising := sorted(kept)) == self.keep and self._chain(rising)

    def __iter__(self) -> Iterator[Kept]:
        """Yield every legal set, in lexical order; :meth:`size` says how many there are."""
        may = self.may_UK.tolist()

        def grow(kept: Kept, unit: int) -> Iterator[Kept]:
            if len(kept) == self.keep:
                yield from [kept] if self.pinned <= set(kept) else []
                return
            for u in range(unit, self.units - self.keep + len(kept) + 1):
                if may[u][len(kept)]:
                    yield from grow((*kept, u), u + 1)
                if u in self.pinned:
                    return

        return grow((), 0)

    def _chain(self, rising: list[int]) -> bool:
        """Return whether units are distinct, include the pinned ones, and may follow each other."""
        inside = all(0 <= u < self.units for u in rising) and all(a < b for a, b in pairwise(rising))
        if not inside or not self.pinned <= set(rising):
            return False
        return bool(self.allowed(torch.tensor(rising), torch.arange(len(rising))).all())

    # ------------------------------------------------------------------ tables

    def argmax(self, scores: Tensor) -> Tensor:
        """Return the legal set of the highest sum of scores ``[..., U]``, as ones and zeros (Viterbi)."""
        theta = scores.detach().double().cpu()
        best, kept = self._start(theta), []
        for unit in range(self.units):
            out, into = self._step(best, theta, unit)
            kept.append(into > out)
            best = torch.maximum(out, into)
        return self._walk(kept).to(scores)

    def log_total(self, theta: Tensor) -> Tensor:
        """Return ``log sum_S exp(sum of theta over S)`` ``[...]`` for theta ``[..., U]``, differentiable."""
        return self._sums(theta.double().cpu())[-1][..., -1]

    def marginals(self, theta: Tensor) -> Tensor:
        """Return the probability ``[..., U]`` that each unit is kept under logits ``theta [..., U]``.

        It is the gradient of :meth:`log_total`, and differentiable itself.
        """
        with torch.enable_grad():
            live = theta if theta.requires_grad else theta.detach().requires_grad_()
            (chance,) = torch.autograd.grad(self.log_total(live).sum(), live, create_graph=True)
        return chance if theta.requires_grad else chance.detach()

    def draw(self, theta: Tensor, generator: torch.Generator) -> Tensor:
        """Draw a legal set with probability ``P(S)`` under theta ``[..., U]``, as ones and zeros."""
        logits = theta.detach().double().cpu()
        table = self._sums(logits)
        coin = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
        kept = []
        for unit in range(self.units):
            _, into = self._step(table[unit], logits, unit)
            kept.append(coin[..., unit, None] < (into - table[unit + 1]).exp())
        return self._walk(kept).to(theta)

    def uniform(self, generator: torch.Generator) -> Kept:
        """Draw a legal set, each equally likely."""
        drawn = self.draw(torch.zeros(self.units), generator)
        return tuple(drawn.nonzero().flatten().tolist())

    def _start(self, theta: Tensor) -> Tensor:
        start = theta.new_full((*theta.shape[:-1], self.keep + 1), NEVER)
        start[..., 0] = 0.0
        return start

    def _step(self, row: Tensor, theta: Tensor, unit: int) -> tuple[Tensor, Tensor]:
        """Return the next row ``[..., M]`` of a table, if ``unit`` is not kept and if it is."""
        never = torch.full_like(row, NEVER)
        into = torch.where(self.may_UK[unit], row[..., :-1] + theta[..., unit, None], NEVER)
        return never if unit in self.pinned else row, torch.cat([never[..., :1], into], -1)

    def _sums(self, theta: Tensor) -> list[Tensor]:
        """Return U + 1 rows ``[..., M]``: log-sums over the ways to keep m of the first units."""
        sums = [self._start(theta)]
        for unit in range(self.units):
            sums.append(torch.stack(self._step(sums[-1], theta, unit)).logsumexp(0))
        return sums

    def _walk(self, kept: list[Tensor]) -> Tensor:
        """Trace a set ``[..., U]`` back from the last unit.

        Args:
            kept: for each unit, whether it is kept if m units up to it are, ``[..., M]``.
        """
        left = torch.full(kept[0].shape[:-1], self.keep)
        out = []
        for unit in reversed(kept):
            out.append(unit.gather(-1, left[..., None])[..., 0])
            left = left - out[-1].long()
        return torch.stack(out[::-1], -1)


class AnyOf(Space):
    """The space of all sets of ``keep`` units."""

    def allowed(self, unit: Tensor, before: Tensor) -> Tensor:
        return unit >= before

    def argmax(self, scores: Tensor) -> Tensor:
        """Return 1 at the ``keep`` highest scores, else 0, by sorting; of equal scores the last stay."""
        forced = scores.detach().clone()
        forced[..., sorted(self.pinned)] = float("inf")
        order = forced.sort(dim=-1, stable=True).indices
        return torch.ones_like(scores).scatter(-1, order[..., : self.units - self.keep], 0.0)

    def marginals(self, theta: Tensor) -> Tensor:
        """Return the probability ``[..., U]`` that each unit is kept under logits ``theta [..., U]``.

        It is exact and differentiable up to ``TABULATED`` units. For more it is ``sigmoid(theta - c)``, with
        c such that all sum to ``keep``, and 1 for pinned units: off by about 1 / U (Hajek, Ann. Math. Stat.
        1964), without gradient.
        """
        if self.units <= TABULATED:
            return super().marginals(theta)
        odds = theta.detach().double().clone()
        odds[..., sorted(self.pinned)] = float("inf")
        finite = odds[odds.isfinite()]
        low, high = odds.new_full((*odds.shape[:-1], 1), float(finite.min()) - 50), finite.max() + 50
        high = high.expand_as(low)
        for _ in range(80):
            level = (low + high) / 2
            above = torch.sigmoid(odds - level).sum(-1, keepdim=True) > self.keep
            low, high = torch.where(above, level, low), torch.where(above, high, level)
        return torch.sigmoid(odds - level).to(theta)

    def uniform(self, generator: torch.Generator) -> Kept:
        free = [u for u in range(self.units) if u not in self.pinned]
        order = torch.randperm(len(free), generator=generator).tolist()
        gone = {free[i] for i in order[: self.units - self.keep]}
        return tuple(u for u in range(self.units) if u not in gone)

    def neighbours(self, kept: Kept) -> Iterator[Kept]:
        """Yield each set that has one removed unit in the place of a kept one."""
        for back in sorted(set(range(self.units)) - set(kept)):
            for out in kept:
                if out not in self.pinned:
                    yield tuple(sorted({*kept, back} - {out}))

    def shorter(self, kept: Kept) -> Iterator[Kept]:
        """Yield each set without one of the kept units."""
        return (tuple(k for k in kept if k != out) for out in kept if out not in self.pinned)
