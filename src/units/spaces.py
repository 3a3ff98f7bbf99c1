"""Which sets of units a mask may keep: the best set, chances, exact draws, neighbours.

A unit is a layer, half of one, or a part of its width; its kind says what removing it does to a model. A
space knows numbers only: ``units`` of them in order of computation, of which each legal set keeps ``keep``.
All sets of a space have one size, so all its cuts cost the same.

============ =============================== ==============================================================
space        units                           legal
============ =============================== ==============================================================
AnyOf        layers, or the width of a layer any ``keep`` of them
Alternating  2 L halves of L layers          attention, feed-forward, attention, feed-forward, ... in order
============ =============================== ==============================================================

The law of a space on its legal sets is ``P(S) ~ exp(sum of theta over S)``: uniform at theta = 0, and nearer
to the best set the larger theta is. Gumbel noise on theta and then :meth:`Space.argmax` is perturb-and-MAP
(Papandreou and Yuille, ICCV 2011); in ``AnyOf`` it is the Gumbel-TopK draw.

Everything is a table over (unit, number kept before it), as long as there are units, in float64: exact for
any number of sets.

Shapes: U units, K = ``keep``, M = K + 1 (none to all of them kept); ``...`` are groups that are chosen alike
and apart, such as the layers whose channels are the units.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

NEVER = -1e200
"""Logarithm of zero, below any score. Finite, because infinity has no second derivative."""

TABULATED = 512
"""Most units whose chances are summed up exactly: a table of their number squared, in each group."""

Kept = tuple[int, ...]
"""Units that stay, rising."""


class Space:
    """Legal sets of which each unit is kept or not by how many before it are kept.

    Args:
        units: number of units, U.
        keep: units that each set keeps, K.
        pinned: units that are in each set.

    Attributes:
        groups: parts of the units that are chosen alike and apart; see :class:`src.units.groups.InEach`.
    """

    groups = 1

    def __init__(self, units: int, keep: int, pinned: Iterable[int] = ()) -> None:
        self.units, self.keep, self.pinned = units, keep, frozenset(pinned)

    @cached_property
    def may_UK(self) -> Tensor:
        """Whether unit u may be kept when exactly k units before it are: bool ``[U, K]``, k = 0 ... K - 1."""
        return self.allowed(torch.arange(self.units)[:, None], torch.arange(self.keep)[None])

    def allowed(self, unit: Tensor, before: Tensor) -> Tensor:
        """Whether ``unit`` may be kept when ``before`` units in front of it are; both broadcast to [U, K]."""
        raise NotImplementedError

    def holding(self, units: Iterable[int]) -> Space:
        """The part of this space whose sets keep these units besides."""
        return type(self)(self.units, self.keep, self.pinned | {*units})

    def neighbours(self, kept: Kept) -> Iterator[Kept]:
        """Yield each legal set that one exchange of kept and removed units turns ``kept`` into."""
        raise NotImplementedError

    def shorter(self, kept: Kept) -> Iterator[Kept]:
        """The legal subsets of ``kept`` in the next smaller space of this kind."""
        raise NotImplementedError

    def starts(self, scores: Tensor) -> Iterator[Kept]:
        """Yield further legal sets, found by scores ``[U]``, where a search over neighbours may start."""
        return iter(())

    # ------------------------------------------------------------------ counting

    def size(self) -> int:
        """The number of legal sets."""
        ways = [1] + [0] * self.keep
        for unit, may in enumerate(self.may_UK.tolist()):
            kept = [0, *(before * ok for before, ok in zip(ways, may, strict=False))]
            ways = kept if unit in self.pinned else [a + b for a, b in zip(ways, kept, strict=True)]
        return ways[-1]

    def legal(self, kept: Iterable[int]) -> bool:
        """Whether these units are a set of the space."""
        return len(rising := sorted(kept)) == self.keep and self._chain(rising)

    def __iter__(self) -> Iterator[Kept]:
        """Every legal set, in lexical order; :meth:`size` says how many."""
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
        """Whether units are distinct, hold the pinned, and may follow each other."""
        inside = all(0 <= u < self.units for u in rising) and all(a < b for a, b in pairwise(rising))
        if not inside or not self.pinned <= set(rising):
            return False
        return bool(self.allowed(torch.tensor(rising), torch.arange(len(rising))).all())

    # ------------------------------------------------------------------ tables

    def argmax(self, scores: Tensor) -> Tensor:
        """The legal set of the highest sum of scores ``[..., U]``, as ones and zeros (Viterbi)."""
        theta = scores.detach().double().cpu()
        best, kept = self._start(theta), []
        for unit in range(self.units):
            out, into = self._step(best, theta, unit)
            kept.append(into > out)
            best = torch.maximum(out, into)
        return self._walk(kept).to(scores)

    def log_total(self, theta: Tensor) -> Tensor:
        """``log sum_S exp(sum of theta over S)`` ``[...]``, float64, differentiable."""
        return self._sums(theta.double().cpu())[-1][..., -1]

    def marginals(self, theta: Tensor) -> Tensor:
        """Chance ``[..., U]`` that a unit is kept: the gradient of :meth:`log_total`, differentiable."""
        with torch.enable_grad():
            live = theta if theta.requires_grad else theta.detach().requires_grad_()
            (chance,) = torch.autograd.grad(self.log_total(live).sum(), live, create_graph=True)
        return chance if theta.requires_grad else chance.detach()

    def draw(self, theta: Tensor, generator: torch.Generator) -> Tensor:
        """An exact draw from the law, as ones and zeros ``[..., U]``: the table of sums, walked backwards."""
        logits = theta.detach().double().cpu()
        table = self._sums(logits)
        coin = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
        kept = []
        for unit in range(self.units):
            _, into = self._step(table[unit], logits, unit)
            kept.append(coin[..., unit, None] < (into - table[unit + 1]).exp())
        return self._walk(kept).to(theta)

    def uniform(self, generator: torch.Generator) -> Kept:
        """A legal set, each equally likely."""
        drawn = self.draw(torch.zeros(self.units), generator)
        return tuple(drawn.nonzero().flatten().tolist())

    def _start(self, theta: Tensor) -> Tensor:
        start = theta.new_full((*theta.shape[:-1], self.keep + 1), NEVER)
        start[..., 0] = 0.0
        return start

    def _step(self, row: Tensor, theta: Tensor, unit: int) -> tuple[Tensor, Tensor]:
        """A row of a table ``[..., M]`` after one more unit: where it is not kept, and where it is."""
        never = torch.full_like(row, NEVER)
        into = torch.where(self.may_UK[unit], row[..., :-1] + theta[..., unit, None], NEVER)
        return never if unit in self.pinned else row, torch.cat([never[..., :1], into], -1)

    def _sums(self, theta: Tensor) -> list[Tensor]:
        """Log-sums over the ways to keep m of the first units: U + 1 tables ``[..., M]``."""
        sums = [self._start(theta)]
        for unit in range(self.units):
            sums.append(torch.stack(self._step(sums[-1], theta, unit)).logsumexp(0))
        return sums

    def _walk(self, kept: list[Tensor]) -> Tensor:
        """From the last unit to the first, by whether each is kept when m up to it are, ``[..., M]``."""
        left = torch.full(kept[0].shape[:-1], self.keep)
        out = []
        for unit in reversed(kept):
            out.append(unit.gather(-1, left[..., None])[..., 0])
            left = left - out[-1].long()
        return torch.stack(out[::-1], -1)


class AnyOf(Space):
    """Any ``keep`` of the units."""

    def allowed(self, unit: Tensor, before: Tensor) -> Tensor:
        return unit >= before

    def argmax(self, scores: Tensor) -> Tensor:
        """The ``keep`` highest scores: sorted, the quick way in this space; of equal ones the last stay."""
        forced = scores.detach().clone()
        forced[..., sorted(self.pinned)] = float("inf")
        order = forced.sort(dim=-1, stable=True).indices
        return torch.ones_like(scores).scatter(-1, order[..., : self.units - self.keep], 0.0)

    def marginals(self, theta: Tensor) -> Tensor:
        """Exact for up to ``TABULATED`` units.

        Of more, the chances of coins that fall apart, with as many kept on average: within about one in the
        number of units (Hajek, Ann. Math. Stat. 1964). They are not differentiable.
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
        """Yield each set that has a removed unit in the place of a kept one."""
        for back in sorted(set(range(self.units)) - set(kept)):
            for out in kept:
                if out not in self.pinned:
                    yield tuple(sorted({*kept, back} - {out}))

    def shorter(self, kept: Kept) -> Iterator[Kept]:
        """Yield each set without one of the kept units."""
        return (tuple(k for k in kept if k != out) for out in kept if out not in self.pinned)


class Alternating(Space):
    """Halves of layers that pair up into whole layers again.

    Unit 2 l is the attention of layer l, unit 2 l + 1 its feed-forward. In a legal set an attention comes
    first and a feed-forward last, and the two kinds take turns: new layer k has the attention of layer
    ``i_k`` and the feed-forward of ``j_k``, with ``i_1 <= j_1 < i_2 <= j_2 < ...``. Whole layers are the sets
    with i = j.
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
        """Yield the best set of whole layers; it is nearer to the best set of halves than many such sets."""
        layers = AnyOf(self.units // 2, self.keep // 2, {unit // 2 for unit in self.pinned})
        if len(layers.pinned) > layers.keep:
            return
        kept = layers.argmax(scores.reshape(-1, 2).sum(1)).nonzero().flatten().tolist()
        yield tuple(unit for layer in kept for unit in (2 * layer, 2 * layer + 1))

    def shorter(self, kept: Kept) -> Iterator[Kept]:
        """Yield each set without two consecutive kept halves."""
        for pair in pairwise(kept):
            if not self.pinned & {*pair}:
                yield tuple(k for k in kept if k not in pair)
