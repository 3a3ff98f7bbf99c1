"""The polish ends where no neighbour is better, never above where it began, and measures what it may."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from src.policies.polish import polish
from src.policies.settle import polished
from src.units.alternating import Alternating
from src.units.spaces import AnyOf, Kept, Space

SPACES = [AnyOf(9, 5), AnyOf(9, 5, [8]), Alternating(12, 8), Alternating(12, 6, [0, 1])]


def named(space: Space) -> str:
    return f"{type(space).__name__} {space.keep} of {space.units} with {sorted(space.pinned)}"


class Costs:
    """A divergence of sets: costs of single units and of pairs, drawn from a seed; notes what is asked."""

    def __init__(self, space: Space, seed: int, pairs: float) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.one_U = torch.rand(space.units, generator=draw, dtype=torch.float64)
        self.two_UU = pairs * torch.rand(space.units, space.units, generator=draw, dtype=torch.float64)
        self.asked: list[Kept] = []

    def of(self, kept: Kept) -> float:
        gone = torch.ones_like(self.one_U)
        gone[list(kept)] = 0.0
        return float(gone @ self.one_U + gone @ self.two_UU @ gone)

    def measure(self, masks: Sequence[Kept], quick: bool = False) -> list[float]:
        self.asked += masks
        return [self.of(kept) for kept in masks]


@pytest.mark.parametrize("space", SPACES, ids=named)
@pytest.mark.parametrize("seed", range(4))
def test_it_ends_where_no_neighbour_is_better(space: Space, seed: int) -> None:
    costs = Costs(space, seed, pairs=0.3)
    start = space.uniform(torch.Generator().manual_seed(seed))
    end = polish(start, space, costs.measure, swaps=10_000, finalists=10_000)
    assert space.legal(end)
    assert costs.of(end) <= costs.of(start)
    assert costs.of(end) <= min(map(costs.of, space.neighbours(end)))
    assert all(space.legal(kept) for kept in costs.asked)


@pytest.mark.parametrize("space", SPACES[:2], ids=named)
@pytest.mark.parametrize("seed", range(3))
def test_where_units_cost_alone_it_finds_the_best_of_all(space: Space, seed: int) -> None:
    costs = Costs(space, seed, pairs=0.0)
    start = space.uniform(torch.Generator().manual_seed(seed))
    end = polish(start, space, costs.measure, swaps=6, finalists=1)
    assert costs.of(end) == pytest.approx(min(map(costs.of, space)))


@pytest.mark.parametrize("seed", range(6))
def test_halves_that_cost_alone_reach_the_best_of_all_from_anywhere(seed: int) -> None:
    space = Alternating(12, 8)
    costs = Costs(space, seed, pairs=0.0)
    best = min(map(costs.of, space))
    ends = [costs.of(polish(start, space, costs.measure, swaps=10_000, finalists=10_000)) for start in space]
    assert sum(end == pytest.approx(best) for end in ends) >= 0.9 * len(ends)


class Torn(Costs):
    """Layers that lose one half and keep the other cost more than their halves."""

    def of(self, kept: Kept) -> float:
        return super().of(kept) + 0.5 * sum(unit ^ 1 not in kept for unit in kept)


def test_halves_end_nowhere_above_whole_layers_from_their_start() -> None:
    """Few of hundreds of swaps are measured, so a walk over halves alone ends above for some seeds."""
    space, alone, best = Alternating(60, 44), list[float](), list[float]()
    whole = space.layerwise()
    assert whole is not None
    for seed in range(12):
        costs = Torn(space, seed, pairs=0.3)
        (start,) = space.starts(torch.rand(60, generator=torch.Generator().manual_seed(seed)))
        layers = whole.layers(start)
        assert layers is not None

        def measure(masks: Sequence[Kept], quick: bool = False, costs: Costs = costs) -> list[float]:
            return costs.measure([whole.halves(kept) for kept in masks])

        best.append(costs.of(whole.halves(polish(layers, whole.space, measure))))
        alone.append(costs.of(polish(start, space, costs.measure)))
        starts = [start, space.uniform(torch.Generator().manual_seed(seed))]
        end = polished(space, {kept: costs.of(kept) for kept in starts}, costs.measure)
        assert costs.of(end) <= best[-1] <= costs.of(start)
    assert any(a > b for a, b in zip(alone, best, strict=True))


def test_it_measures_few_swaps_on_all_rows_and_none_twice_in_a_round() -> None:
    space, rounds = AnyOf(9, 5), list[tuple[bool, int]]()
    costs = Costs(space, 0, pairs=0.3)

    def measure(masks: Sequence[Kept], quick: bool = False) -> list[float]:
        rounds.append((quick, len(masks)))
        assert len({*masks}) == len(masks)
        return costs.measure(masks)

    polish(next(iter(space)), space, measure, swaps=6, finalists=2)
    alone, swaps, exact = (True, 1 + 9), (True, 3), (False, 1 + 2)
    assert rounds == [alone, swaps, exact] * (len(rounds) // 3)
    rounds.clear()
    polish(next(iter(space)), space, measure, swaps=20, finalists=2)
    assert rounds == [(True, 20), exact] * (len(rounds) // 2), "where there are few, all"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_masks_that_overflow_are_passed_over(bad: float) -> None:
    """Masks without unit 8 overflow; the polish leaves such a start, and finds the best of the others."""
    space, costs = AnyOf(9, 5), Costs(AnyOf(9, 5), 0, pairs=0.0)

    def measure(masks: Sequence[Kept], quick: bool = False) -> list[float]:
        return [costs.of(kept) if 8 in kept else bad for kept in masks]

    for start in ((0, 1, 2, 3, 4), (0, 1, 2, 3, 8)):
        end = polish(start, space, measure, swaps=6, finalists=2)
        assert measure([end])[0] == min(costs.of(kept) for kept in space if 8 in kept)


def test_of_many_units_each_is_measured_alone_in_the_first_round_only() -> None:
    space, seen = AnyOf(40, 20), list[int]()
    costs = Costs(space, 1, pairs=0.0)

    def measure(masks: Sequence[Kept], quick: bool = False) -> list[float]:
        seen.append(len(masks))
        return costs.measure(masks)

    polish(tuple(range(20)), space, measure, swaps=16, finalists=2)
    assert seen[:3] == [41, 8, 3]
    assert len(seen) > 6
    assert max(seen[3:]) == 8
