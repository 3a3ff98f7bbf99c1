"""Laws of GRAIN: its average by hand, its schedule's ends, and removal that is never taken back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from src.callbacks import PruningCurriculum
from src.errors import ConfigError
from src.mask import Unit
from src.optim import SharedAdam
from src.policies import Grain
from src.search import MaskSearch
from tests.numerics.test_fisher import Known, noise
from tests.unit.test_schedules import Run

SIZES: dict[str, dict[str, Any]] = {
    "layer": {"num_layers": 12},
    "half": {"num_layers": 6, "unit": "half"},
    "kv_group": {"num_layers": 3, "unit": "kv_group", "width": 4},
    "channel": {"num_layers": 2, "unit": "channel", "width": 6},
}


def grain(remove: int = 3, unit: Unit = "layer", **keys: Any) -> Grain:
    policy = Grain(**keys)
    policy.setup(remove=remove, **SIZES[unit])
    policy.initialise(Known(noise(12)))
    return policy


def told(policy: Grain, grads_DU: Tensor) -> Tensor:
    """One step: the mask of every draw, and the loss's gradient with respect to it."""
    gates_DU = torch.stack([policy.sample(0, draw) for draw in range(len(grads_DU))])
    assert policy.surrogate(gates_DU, torch.ones(len(grads_DU)), grads_DU) == 0
    return gates_DU


def closed(policy: Grain) -> set[int]:
    return {*(policy.sample(0, 0) == 0).nonzero().flatten().tolist()}


def test_importance_is_the_exponential_average_of_gate_times_gradient() -> None:
    """The start counts once, for the first removal. Signs of draws do not cancel; a closed gate counts 0."""
    policy = grain(1, decay=0.5)
    start = policy.logits.detach().clone()
    torch.testing.assert_close(start, noise(12).abs().mean(0).float())
    (out,) = closed(policy)
    assert out == int(start.argmin())
    grads_DU = torch.stack([torch.arange(12.0), -torch.arange(12.0) - 2])
    gates_DU = told(policy, grads_DU)
    first_U = torch.arange(12.0) + 1
    first_U[out] = 0
    torch.testing.assert_close(policy.logits.detach(), first_U)
    torch.testing.assert_close(policy.logits.detach(), (gates_DU * grads_DU).abs().mean(0))
    told(policy, torch.ones(1, 12))
    second_U = torch.ones(12)
    second_U[out] = 0
    torch.testing.assert_close(policy.logits.detach(), 0.5 * first_U + 0.5 * second_U)


@pytest.mark.parametrize("unit", list(SIZES))
def test_removal_is_monotone_legal_and_exact_whatever_the_gradients_say(unit: Unit) -> None:
    """Also where the gradients later turn against what went first."""
    most = 3 if unit != "half" else 4
    policy = grain(most, unit)
    before: set[int] = set()
    for step in range(24):
        policy.remove = min(most, 1 + step // 4)
        told(policy, noise(12, batches=1, seed=step).float() * 10.0**step)
        gone = closed(policy)
        assert before <= gone
        assert len(gone) == policy.closed
        assert policy.spare(policy.remove).legal({*range(12)} - gone)
        final = {*range(12)} - {*policy.harden()}
        assert gone <= final
        assert policy.space.legal(policy.harden())
        before = gone
    assert {*range(12)} - {*policy.harden()} == before


def test_the_least_important_of_those_that_are_left_goes_next() -> None:
    policy = grain(3)
    policy.remove = 1
    (first,) = closed(policy)
    grads_DU = torch.arange(12.0, 0, -1)[None]
    told(policy, grads_DU)
    policy.remove = 3
    assert closed(policy) == {first} | {*[u for u in range(11, -1, -1) if u != first][:2]}


def test_layers_that_must_stay_stay_and_a_broken_gradient_counts_as_zero() -> None:
    policy = Grain(always_keep=[0, -1])
    policy.setup(12, 4)
    start_BU = noise(12)
    start_BU[0, 5] = math.inf
    policy.initialise(Known(start_BU))
    assert not {0, 11} & closed(policy), "before any gradient too"
    told(policy, torch.full((1, 12), math.nan))
    assert policy.logits.isfinite().all()
    assert not {0, 11} & closed(policy)


@pytest.mark.parametrize("until", [0.25, 1.0])
def test_the_cubic_schedule_has_its_ends_and_is_fast_at_first(until: float) -> None:
    """``r(t) = r_f + (1 - r_f) (1 - p)^3``: of n units ``n (1 - (1 - p)^3)`` are gone."""
    cubic = Run(40, 16).course(PruningCurriculum(until, "cubic"), "remove")
    linear = Run(40, 16).course(PruningCurriculum(until), "remove")
    assert cubic == sorted(cubic)
    assert cubic[-1] == cubic[math.ceil(until * 40) - 1] == 16
    assert all(fast >= slow for fast, slow in zip(cubic, linear, strict=True))
    assert cubic[0] == math.ceil(round(16 * (1 - (1 - 1 / (until * 40)) ** 3), 9))
    half = int(until * 40) // 2 - 1
    assert cubic[half] == 14  # 16 (1 - 1 / 8)


@pytest.mark.parametrize("optimizer", [SharedAdam, torch.optim.Adam])
def test_the_optimiser_moves_nothing_and_a_checkpoint_holds_all(
    optimizer: type[torch.optim.Optimizer],
) -> None:
    policy = grain(4)
    policy.remove = 2
    steps = optimizer(policy.parameters(), lr=1.0)  # type: ignore[call-arg]
    for step in range(3):
        gates_DU, grads_DU = policy.sample(step, 0)[None], noise(12, batches=1, seed=step).float()
        loss = policy.surrogate(gates_DU, torch.ones(1), grads_DU)
        before = policy.logits.detach().clone()
        steps.zero_grad()
        loss.backward()
        steps.step()
        assert torch.equal(policy.logits, before)
    resumed = Grain()
    resumed.setup(12, 4)
    resumed.load_state_dict(policy.state_dict())
    resumed.remove = 2
    assert resumed.harden() == policy.harden()
    assert closed(resumed) == closed(policy)
    grads_DU = noise(12, batches=1, seed=9).float()
    told(policy, grads_DU)
    told(resumed, grads_DU)
    assert torch.equal(resumed.logits, policy.logits)


def test_one_order_of_removal_serves_one_size(teacher_dir: str) -> None:
    with pytest.raises(ConfigError, match="Grain chooses for one count alone"):
        MaskSearch(teacher_dir, Grain(), budgets=[0.25, 0.5])
