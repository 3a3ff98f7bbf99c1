"""Spaces against enumeration: sizes, the best set, chances, draws, neighbours."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations, pairwise
from math import comb

import pytest
import torch

from src.units.alternating import Alternating
from src.units.groups import InEach
from src.units.spaces import AnyOf, Space


def halves(layers: int, keep: int, pinned: Iterable[int] = ()) -> Alternating:
    return Alternating(2 * layers, 2 * keep, pinned)


SMALL: list[Space] = [
    *(AnyOf(units, keep) for units in range(1, 9) for keep in range(1, units + 1)),
    *(halves(layers, keep) for layers in range(1, 9) for keep in range(1, layers + 1)),
    AnyOf(7, 4, pinned=[0, 6]),
    AnyOf(5, 3, pinned=[1, 2, 4]),
    halves(5, 3, pinned=[0, 9]),
    halves(6, 3, pinned=[4, 5, 7]),
]
GROUPS = [
    *(
        InEach(groups, AnyOf(units, keep))
        for groups in (1, 2, 3)
        for units in range(1, 5)
        for keep in range(1, units + 1)
    ),
    InEach(2, AnyOf(8, 3)),
    InEach(2, halves(3, 2)),
]
SMALL += GROUPS
SPACES = [space for space in SMALL if space.size() <= 5000]


def names(space: Space) -> str:
    return f"{space.groups}x{type(space).__name__}-{space.units}-{space.keep}-{sorted(space.pinned)}"


every = pytest.mark.parametrize("space", SPACES, ids=names)


def theta_of(space: Space, spread: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(space.units * 31 + space.keep)
    return spread * torch.randn(space.units, generator=generator, dtype=torch.float64)


def indicator(space: Space) -> torch.Tensor:
    """All legal sets as rows of ones and zeros ``[S, U]``."""
    table = torch.zeros(space.size(), space.units, dtype=torch.float64)
    for row, kept in zip(table, space, strict=True):
        row[list(kept)] = 1.0
    return table


def alternates(kept: tuple[int, ...]) -> bool:
    """The definition: attention i_k and feed-forward j_k with i_1 <= j_1 < i_2 <= j_2 < ..."""
    kinds = [unit % 2 for unit in kept]
    return kinds == [0, 1] * (len(kept) // 2) and list(kept) == sorted(set(kept))


def defined(space: Space, kept: tuple[int, ...]) -> bool:
    if isinstance(space, InEach):
        size = space.each.units
        parts = [tuple(u % size for u in kept if u // size == group) for group in range(space.groups)]
        return all(len(part) == space.each.keep and defined(space.each, part) for part in parts)
    return isinstance(space, AnyOf) or alternates(kept)


@every
def test_the_sets_are_those_of_the_definition(space: Space) -> None:
    legal = [
        kept
        for kept in combinations(range(space.units), space.keep)
        if space.pinned <= set(kept) and defined(space, kept)
    ]
    assert list(space) == legal
    assert space.size() == len(legal)
    assert all(space.legal(kept) for kept in legal)


def test_sizes_have_closed_forms() -> None:
    assert AnyOf(64, 48).size() == comb(64, 48)
    assert halves(16, 12).size() == comb(16 + 12, 24) == 20_475
    assert halves(30, 22).size() == comb(52, 44) == 752_538_150


@every
def test_argmax_is_the_best_of_all(space: Space) -> None:
    for score in (theta_of(space), -theta_of(space, 0.3), theta_of(space, 40.0)):
        sums = indicator(space) @ score
        found = space.argmax(score)
        assert space.legal(found.nonzero().flatten().tolist())
        assert float(found @ score) == pytest.approx(float(sums.max()), abs=1e-12)


@every
def test_marginals_are_those_of_enumeration(space: Space) -> None:
    theta, sets = theta_of(space), indicator(space)
    law = torch.softmax(sets @ theta, 0)
    assert (space.marginals(theta) - law @ sets).abs().max() < 1e-12
    assert space.log_total(theta) == pytest.approx(float((sets @ theta).logsumexp(0)), abs=1e-12)
    assert float(space.marginals(theta).sum()) == pytest.approx(space.keep, abs=1e-11)


@every
def test_the_slope_of_the_marginals_is_the_covariance(space: Space) -> None:
    theta, sets = theta_of(space).requires_grad_(), indicator(space)
    law = torch.softmax(sets @ theta.detach(), 0)
    covariance = (sets.T * law) @ sets - torch.outer(law @ sets, law @ sets)
    direction = torch.linspace(-1, 1, space.units, dtype=torch.float64)
    (slope,) = torch.autograd.grad(space.marginals(theta) @ direction, theta)
    assert (slope - covariance @ direction).abs().max() < 1e-11


@pytest.mark.parametrize(
    "space",
    [AnyOf(5, 2), AnyOf(6, 3, [1]), halves(4, 2), halves(4, 2, [3]), InEach(2, AnyOf(4, 2))],
    ids=names,
)
def test_draws_follow_the_law(space: Space) -> None:
    """Chi-square of 20,000 draws at the 0.1 % level; groups are drawn alike and apart."""
    draws, theta = 20_000, theta_of(space, 0.7)
    generator = torch.Generator().manual_seed(5)
    drawn = space.draw(theta.expand(draws, -1), generator)
    sets = indicator(space)
    law = torch.softmax(sets @ theta, 0)
    same = (drawn[:, None] == sets[None]).all(-1)
    assert same.any(1).all(), "each draw is a legal set"
    expected = law * draws
    chi = float(((same.sum(0) - expected) ** 2 / expected).sum())
    freedom = len(sets) - 1
    assert chi < freedom + 3.09 * (2 * freedom) ** 0.5 + 7  # above the 99.9 % quantile
    again = space.draw(theta.expand(draws, -1), torch.Generator().manual_seed(5))
    assert torch.equal(drawn, again)


@every
def test_neighbours_are_legal_and_mutual_and_reach_every_set(space: Space) -> None:
    sets = set(space)
    around = {kept: set(space.neighbours(kept)) for kept in sets}
    assert all(kept not in near and near <= sets for kept, near in around.items())
    seen, front = set(), {min(sets)}
    while front:
        seen |= front
        front = {near for kept in front for near in around[kept]} - seen
    assert seen == sets
    single = {(a, b) for a in sets for b in around[a] if len({*a} ^ {*b}) == 2}
    assert single == {(b, a) for a, b in single}
    if isinstance(space, AnyOf):
        assert all(len({*a} ^ {*b}) == 2 for a in sets for b in around[a])


@pytest.mark.parametrize("layers", range(2, 8))
def test_where_two_halves_go_every_cut_is_a_neighbour_of_every_other(layers: int) -> None:
    """The 2 L - 1 cuts lose two halves that lie side by side, of one layer or of two."""
    space = halves(layers, layers - 1)
    cuts = {
        tuple(u for u in range(2 * layers) if u not in (gone, gone + 1)) for gone in range(2 * layers - 1)
    }
    assert set(space) == cuts
    assert all(set(space.neighbours(kept)) == cuts - {kept} for kept in cuts)


@pytest.mark.parametrize("pinned", [(), (6, 7), (3,)])
def test_a_walk_over_halves_may_start_from_the_best_whole_layers(pinned: tuple[int, ...]) -> None:
    scores = torch.randn(16, generator=torch.Generator().manual_seed(4))
    space = halves(8, 3, pinned)
    whole = [kept for kept in space if all(unit ^ 1 in kept for unit in kept)]
    (start,) = space.starts(scores)
    assert start == max(whole, key=lambda kept: float(scores[list(kept)].sum()))
    assert list(halves(8, 3, range(0, 16, 2)[:4]).starts(scores)) == []
    assert list(AnyOf(8, 3).starts(scores[:8])) == []


@pytest.mark.parametrize("pinned", [(), (6, 7), (3,)])
def test_the_sets_of_whole_layers_are_sets_of_layers(pinned: tuple[int, ...]) -> None:
    space = halves(6, 4, pinned)
    within = space.layerwise()
    assert within is not None
    whole = {kept for kept in space if all(unit ^ 1 in kept for unit in kept)}
    assert {within.halves(layers) for layers in within.space} == whole
    assert {kept for kept in space if within.layers(kept)} == whole
    assert all(within.layers(within.halves(layers)) == layers for layers in within.space)
    assert AnyOf(8, 3).layerwise() is None


@pytest.mark.parametrize("layers", range(2, 8))
def test_shorter_sets_are_all_legal_subsets(layers: int) -> None:
    for keep in range(2, layers + 1):
        small = set(halves(layers, keep - 1))
        for kept in halves(layers, keep):
            assert set(halves(layers, keep).shorter(kept)) == {s for s in small if set(s) <= set(kept)}
        assert set(AnyOf(layers, keep).shorter(tuple(range(keep)))) == set(
            combinations(range(keep), keep - 1)
        )


def test_a_pinned_unit_stays_whatever_its_score() -> None:
    for space in (AnyOf(8, 3, [7]), halves(8, 3, [14, 15])):
        score = torch.full((space.units,), 5.0).index_fill(0, torch.tensor(sorted(space.pinned)), -50.0)
        assert space.argmax(score)[sorted(space.pinned)].eq(1).all()
        assert (space.marginals(score.double())[sorted(space.pinned)] - 1).abs().max() < 1e-12
        drawn = space.draw(score, torch.Generator().manual_seed(0))
        assert drawn[sorted(space.pinned)].eq(1).all()


def test_large_scores_stay_finite() -> None:
    space = halves(40, 30)
    theta = torch.linspace(-900, 900, 80, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(space.marginals(theta)[7], theta)
    assert space.marginals(theta).isfinite().all()
    assert slope.isfinite().all()
    assert all(a < b for a, b in pairwise(space.argmax(theta).nonzero().flatten().tolist()))


def test_chances_of_many_units_are_near_the_exact_ones() -> None:
    """Beyond what is tabulated, coins of one level stand in: as many kept, each within a thousandth."""
    theta = torch.randn(2, 600, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    space, table = AnyOf(600, 450, [3]), Space.marginals
    quick, exact = space.marginals(theta), table(space, theta)
    assert (quick.sum(-1) - 450).abs().max() < 1e-6
    assert quick[:, 3].eq(1).all()
    assert 1e-6 < (quick - exact).abs().max() < 1e-3


def test_groups_are_drawn_uniformly_and_apart() -> None:
    space, generator = InEach(3, AnyOf(5, 2)), torch.Generator().manual_seed(0)
    drawn = {space.uniform(generator) for _ in range(2_000)}
    assert all(space.legal(kept) for kept in drawn)
    assert space.size() == 1000
    assert len(drawn) > 800  # 865 are expected of as many draws
    assert not space.legal((0, 1, 2, 5, 10, 11))
