"""Laws of a search with several budgets: whose turn it is, what it learns from, what it ends with."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch

from src import policies
from src.callbacks.harden import choose
from src.data.batches import Supervised
from src.errors import ConfigError
from src.mask import Unit
from src.models.constraints import Constraints
from src.plan.toy import CountingProbe, Toy
from src.policies import SLEB, GumbelTopK, MaskPolicy
from src.policies.draws import draw
from src.policies.one_shot import OneShot
from src.search import MaskSearch
from src.units.amount import Amount
from src.units.kinds import KINDS
from tests.numerics.test_search import batch, search
from tests.tiny import tiny_config

__all__ = ["batch"]
THREE = [1 / 6, 1 / 3, 1 / 2]
"""One, two and three of six layers."""
UNITS: tuple[Unit, ...] = ("layer", "half")


def several(teacher_dir: str, policy: MaskPolicy | None = None, **keys: Any) -> MaskSearch:
    """A search with three budgets, its logits at random."""
    made = MaskSearch(teacher_dir, policy or GumbelTopK(), budgets=THREE, **keys)
    with torch.no_grad():
        made.policy.logits.copy_(torch.randn(made.policy.units, generator=torch.Generator().manual_seed(3)))
    return made


@pytest.mark.parametrize("unit", UNITS)
def test_draws_take_turns_and_remove_exactly_their_budget(
    unit: Unit, teacher_dir: str, batch: dict[str, torch.Tensor]
) -> None:
    made = search(teacher_dir, remove=None, budgets=THREE, draws=4, unit=unit)
    signal = made.teacher_signal(rows := Supervised.of(batch))
    each, closed = 1 if unit == "layer" else 2, Counter[int]()
    for step in range(3):
        made.trainer.global_step = step  # type: ignore[misc]
        drawn = [draw(made, rows, signal, made.sample(number)).gates_U for number in range(4)]
        counts = [int((gates_U == 0).sum()) // each for gates_U in drawn]
        assert set(counts) == {1, 2, 3}, "every step learns of every budget"
        closed.update(counts)
    assert closed == {1: 4, 2: 4, 3: 4}


def test_the_gradient_is_that_of_the_mean_logarithm(teacher_dir: str, batch: dict[str, torch.Tensor]) -> None:
    """So the budgets weigh alike, although their divergences lie far apart."""
    made = search(teacher_dir, remove=None, budgets=THREE)
    (grad,) = torch.autograd.grad(made.training_step(batch, 0), made.policy.logits)
    signal, losses = made.teacher_signal(rows := Supervised.of(batch)), []
    for number in range(3):
        with made.aimed(made.budgets[(5 + number) % 3]):
            losses.append(made.divergence(rows, signal, made.policy.sample(5, number)))
    (direct,) = torch.autograd.grad(torch.stack(losses).log().mean(), made.policy.logits)
    torch.testing.assert_close(grad, direct, rtol=1e-5, atol=1e-9)


RANKERS = [each for each in vars(policies).values()
           if isinstance(each, type) and issubclass(each, MaskPolicy) and each.any_count]  # fmt: skip


@pytest.mark.parametrize("kind", RANKERS)
def test_a_policy_aimed_at_a_count_is_one_of_that_count(kind: type[MaskPolicy]) -> None:
    for unit, count in itertools.product(kind.works_on, (1, 2, 3)):
        keys: dict[str, Any] = {"always_keep": [] if KINDS[unit].wide else [0], "polish": False}
        keys |= {"init": "zeros"} if kind is GumbelTopK else {}
        most, own = kind(**keys), kind(**keys)
        most.setup(7, 3, unit=unit, width=9)
        own.setup(7, count, unit=unit, width=9)
        with torch.no_grad():
            most.logits.copy_(torch.randn(most.units, generator=torch.Generator().manual_seed(count)))
            own.logits.copy_(most.logits)
        before = most.harden()
        with most.aimed(count):
            assert most.harden() == own.harden()
            assert torch.equal(most.sample(4, 1), own.sample(4, 1))
            assert torch.equal(most.keep_probabilities(), own.keep_probabilities())
        assert most.harden() == before


def test_greed_of_the_largest_budget_is_that_of_every_smaller_one() -> None:
    for unit in UNITS:
        most, probe = SLEB("divergence", always_keep=()), CountingProbe(8 if unit == "layer" else 16, 1)
        most.setup(8, 4, unit=unit)
        most.initialise(probe)
        for count in (1, 2, 3):
            own = SLEB("divergence", always_keep=())
            own.setup(8, count, unit=unit)
            own.initialise(probe)
            with most.aimed(count):
                assert most.harden() == own.harden()


def test_a_curriculum_is_under_way_for_the_larger_budgets_alone() -> None:
    policy = GumbelTopK()
    policy.setup(8, 4)
    policy.remove = 2
    for budget, closed in ((1, 1), (2, 2), (4, 2)):
        with policy.aimed(budget):
            assert int((policy.sample(0, 0) == 0).sum()) == closed


@pytest.mark.parametrize("unit", UNITS)
def test_a_larger_removal_contains_the_smaller_ones_on_request(unit: Unit, teacher_dir: str) -> None:
    free = several(teacher_dir, unit=unit)
    nested = several(teacher_dir, unit=unit, nested=True)
    probe = CountingProbe(units := free.policy.units, 4)
    probe.toy = Toy(units, seed=1, strength=6.0)
    masks = [
        {budget.remove: {*kept} for budget, kept, _ in choose(made, probe, ())} for made in (free, nested)
    ]
    assert masks[1][3] < masks[1][2] < masks[1][1], "what the larger removal keeps stays in the smaller"
    assert masks[0][3] == masks[1][3], "the largest removal is chosen freely"
    assert not masks[0][3] < masks[0][2] < masks[0][1], "of this divergence the best are not nested"


def test_a_nested_mask_is_the_best_that_keeps_what_the_larger_removal_keeps(teacher_dir: str) -> None:
    """The polish reaches it from any start: between six layers and four there are four ways to keep five."""
    made = several(teacher_dir, nested=True)
    probe = CountingProbe(6, 4)
    found = {budget.remove: kept for budget, kept, _ in choose(made, probe, ())}
    for less, more in ((1, 2), (2, 3)):
        inside = [kept for kept in itertools.combinations(range(6), 6 - less) if {*found[more]} < {*kept}]
        cost = {kept: probe.divergence(made.policy.gates(kept)) for kept in inside}
        assert cost[found[less]] == min(cost.values())


def test_recent_masks_compete_within_their_budget(teacher_dir: str) -> None:
    made = several(teacher_dir, GumbelTopK(polish=False))
    probe = CountingProbe(6, 4)
    subsets = [list(itertools.combinations(range(6), count)) for count in (3, 4, 5)]
    best = [min(sets, key=lambda kept: probe.divergence(made.policy.gates(kept))) for sets in subsets]
    assert [kept for _, kept, _ in choose(made, probe, best)] == best


def test_layers_that_a_family_pins_are_those_of_each_count(teacher_dir: str) -> None:
    """Where only the last layers may go, a smaller budget may lose fewer of them."""
    made = several(teacher_dir)
    made.limits = Constraints(tail_only=True)
    kept = {}
    for budget in made.budgets:
        with made.aimed(budget):
            kept[budget.remove] = made.policy.harden()
    assert kept == {1: (0, 1, 2, 3, 4), 2: (0, 1, 2, 3), 3: (0, 1, 2)}


CHOOSERS = [each for each in vars(policies).values()
            if isinstance(each, type) and issubclass(each, MaskPolicy)
            and each not in (MaskPolicy, OneShot) and not each().any_count]  # fmt: skip


@pytest.mark.parametrize("kind", CHOOSERS)
def test_a_method_for_one_count_refuses_several_by_the_key(kind: type[MaskPolicy], teacher_dir: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.budgets: {kind.__name__} .*model\.ratio"):
        MaskSearch(teacher_dir, kind(), budgets=THREE)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "exactly one"),
        ({"ratio": 0.25, "budgets": [0.5]}, "exactly one"),
        ({"budgets": []}, r"model\.budgets: \[\] given"),
        ({"budgets": [0.25, 1.5]}, "above 0 and below 1"),
        ({"budgets": [0.25, 0.26]}, r"0\.25 and 0\.26 both remove 2 of 8"),
    ],
)
def test_budgets_are_refused_by_their_key(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Amount(**given).of(tiny_config("llama", num_hidden_layers=8))


def test_nesting_needs_something_to_nest(teacher_dir: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.nested"):
        MaskSearch(teacher_dir, GumbelTopK(), ratio=0.5, nested=True)
