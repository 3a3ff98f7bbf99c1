"""Laws of the searching rivals: greedy, random, exhaustive, each against its definition on a toy."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from src.errors import ConfigError
from src.policies import SLEB, Exhaustive, MaskPolicy, RandomSearch
from src.policies.measuring import Probe
from src.policies.random_search import best_of

LAYERS, REMOVE = 8, 3


class Toy(Probe):
    """A probe over removal costs with interactions between all pairs of layers; labels disagree with it."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.alone = torch.rand(LAYERS, generator=generator)
        self.pairs = torch.rand(LAYERS, LAYERS, generator=generator)
        self.asked: list[tuple[float, ...]] = []

    def divergence(self, gates: Tensor, quick: bool = False) -> float:
        assert not quick, "a few rows cannot tell good masks apart"
        self.asked.append(tuple(gates.tolist()))
        gone = 1 - gates
        return float(gone @ self.alone + gone @ self.pairs @ gone)

    def cross_entropy(self, gates: Tensor) -> float:
        return self.divergence(gates) + 3 * float(1 - gates[2])

    def without(self, measure: str, removed: tuple[int, ...]) -> float:
        gates = torch.ones(LAYERS)
        gates[list(removed)] = 0.0
        return float(getattr(self, measure)(gates))


def done(asked: MaskPolicy, toy: Toy, remove: int = REMOVE) -> tuple[int, ...]:
    """The layers a policy removes."""
    asked.setup(LAYERS, remove)
    asked.initialise(toy)
    return tuple(i for i in range(LAYERS) if i not in asked.harden())


@pytest.mark.parametrize("measure", ["cross_entropy", "divergence"])
@pytest.mark.parametrize("seed", range(4))
def test_sleb_is_greedy_with_evaluation_anew(measure: str, seed: int) -> None:
    toy, order = Toy(seed), list[int]()
    for _ in range(REMOVE):
        left = [i for i in range(1, LAYERS - 1) if i not in order]
        order.append(min(left, key=lambda i: toy.without(measure, (*order, i))))
    for count in range(1, REMOVE + 1):
        assert done(SLEB(measure=measure), toy, count) == tuple(sorted(order[:count]))


def test_sleb_differs_from_scoring_each_layer_once() -> None:
    """Two layers that stand in for each other both look removable alone."""
    toy = Toy()
    toy.alone, toy.pairs = torch.tensor([9.0, 0.1, 0.1, 1.0, 1.0, 0.5, 1.0, 9.0]), torch.zeros(8, 8)
    toy.pairs[1, 2] = 5.0
    assert done(SLEB(measure="divergence"), toy, 2) == (1, 5)


def test_sleb_costs_what_the_paper_counts_and_spares_the_ends_unless_told() -> None:
    toy = Toy()
    toy.alone[0] = -9.0
    assert 0 not in done(SLEB(measure="divergence"), toy)
    assert len(toy.asked) == sum(LAYERS - i - 2 for i in range(REMOVE))
    assert 0 in done(SLEB(measure="divergence", always_keep=[]), toy)
    first = SLEB(measure="divergence", always_keep=[])
    done(first, toy)
    first.remove = 1  # a curriculum: what greed takes first goes first
    assert first.sample(0, 0).tolist() == [0.0] + [1.0] * (LAYERS - 1)


@pytest.mark.parametrize("masks", [1, 2, 20])
def test_random_search_takes_the_best_of_what_it_draws(masks: int) -> None:
    toy, asked = Toy(), RandomSearch(masks=masks, always_keep=[4], seed=5)
    found = done(asked, toy)
    sets = [tuple(i for i in range(LAYERS) if i not in keep) for keep in asked.draws()]
    assert len(toy.asked) == (masks if masks > 1 else 0), "the plain control costs nothing"
    assert toy.without("divergence", found) == min(toy.without("divergence", s) for s in sets)
    assert all(len(s) == REMOVE and 4 not in s for s in sets)
    again, other = RandomSearch(masks=masks, always_keep=[4], seed=5), RandomSearch(masks=masks, seed=6)
    torch.rand(7)  # the global generator must not matter
    assert done(again, Toy()) == found
    done(other, Toy())
    assert other.draws() != asked.draws()


def test_more_random_masks_contain_fewer_and_all_masks_are_alike_likely() -> None:
    few, many = RandomSearch(masks=3), RandomSearch(masks=5600)
    few.setup(LAYERS, REMOVE)
    many.setup(LAYERS, REMOVE)
    drawn = many.draws()
    assert drawn[:3] == few.draws()
    counts = torch.tensor([drawn.count(keep) for keep in set(drawn)])
    assert len(counts) == 56
    assert (counts - 100).abs().max() < 5 * 10  # five standard deviations of each count


@pytest.mark.parametrize("always_keep", [(), (0, -1)])
def test_exhaustive_is_the_optimum(always_keep: tuple[int, ...]) -> None:
    toy = Toy(3)
    free = [i for i in range(LAYERS) if i not in (0, LAYERS - 1) or not always_keep]
    sets = list(itertools.combinations(free, REMOVE))
    best = min(sets, key=lambda s: toy.without("divergence", s))
    toy.asked.clear()
    assert done(Exhaustive(always_keep=always_keep), toy) == best
    assert len(set(toy.asked)) == len(toy.asked) == len(sets)


def test_exhaustive_refuses_too_many_masks_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match=r"3 of 8 layers are 56 masks, above the limit of 55"):
        Exhaustive(limit=55).setup(LAYERS, REMOVE)
    with pytest.raises(ConfigError, match="10,518,300 masks"):
        Exhaustive().setup(32, 8)
    Exhaustive(limit=56).setup(LAYERS, REMOVE)


def test_no_random_masks_are_refused() -> None:
    with pytest.raises(ConfigError, match="masks: 0 given; accepted: a whole number above 0"):
        RandomSearch(masks=0)


def test_a_mask_without_a_number_never_wins() -> None:
    nan = float("nan")
    assert best_of([(0,), (1,), (2,)], [nan, 2.0, 1.0]) == (2,)
    assert best_of([(0,), (1,)], [float("inf"), nan]) == (0,)


@pytest.mark.parametrize("policy", [SLEB, RandomSearch, Exhaustive])
def test_the_answer_is_in_the_checkpoint_and_training_does_not_move_it(policy: type[MaskPolicy]) -> None:
    asked, fresh = policy(), policy()
    found = done(asked, Toy())
    fresh.setup(LAYERS, REMOVE)
    fresh.load_state_dict(asked.state_dict())
    optimizer = torch.optim.Adam(fresh.parameters(), lr=1.0)
    for step in range(3):
        gates = fresh.sample(step, 0)
        assert tuple((gates == 0).nonzero().flatten().tolist()) == found
        fresh.surrogate(gates[None], torch.ones(1), None).backward()
        optimizer.step()
    assert not fresh.needs_gradient
    assert tuple(i for i in range(LAYERS) if i not in fresh.harden()) == found
