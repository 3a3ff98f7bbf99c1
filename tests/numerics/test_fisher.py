"""Laws of Fisher pruning: its scores and sets on hand-worked cases, beside all sets and the paper's loop."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from src.errors import ConfigError
from src.mask import Unit
from src.models.layers import decoder_layers
from src.models.loading import load_model
from src.policies import Fisher
from src.policies.fisher import cost, exchanged, rearranged
from src.policies.measuring import Probe
from src.policies.scores import salience
from src.search import MaskSearch
from src.units.alternating import Alternating
from src.units.spaces import AnyOf, Space
from tests.numerics.test_probe import BATCHES, batches, probe_of

COPIES = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.2, 0.0], [0.0, 0.0, 0.0, 9.0]]).double()
"""Gradients ``[B, U]``: two copies, a third unit orthogonal to them and a little larger, a large last one."""


class Known(Probe):
    """A probe with given gradients of the gates."""

    def __init__(self, grads_BU: Tensor) -> None:
        self.grads_BU = grads_BU

    def gate_gradients(self) -> Tensor:
        return self.grads_BU


def removed(policy: Fisher, grads_BU: Tensor, remove: int, **sizes: Any) -> list[int]:
    policy.setup(remove=remove, **({"num_layers": grads_BU.shape[1]} | sizes))
    policy.initialise(Known(grads_BU))
    return sorted({*range(policy.units)} - {*policy.harden()})


def noise(units: int, batches: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(batches, units, generator=torch.Generator().manual_seed(seed)).double()


# ---------------------------------------------------------------------- the diagonal


def test_a_score_is_the_sum_of_squares_of_each_batch_not_the_square_of_the_mean() -> None:
    """The first unit's gradients cancel over the batches, and count all the same."""
    grads_BU = torch.tensor([[2.0, 1.0, 0.0], [-2.0, 1.0, 1.0]]).double()
    policy = Fisher()
    assert removed(policy, grads_BU, 1) == [2]
    torch.testing.assert_close(policy.logits.detach(), torch.tensor([8.0, 2.0, 1.0]) / 11)


@pytest.mark.parametrize("unit", ["layer", "half"])
def test_the_set_is_the_best_legal_one_for_the_diagonal(unit: Unit) -> None:
    grads_BU, layers = noise(12), 6 if unit == "half" else 12
    policy = Fisher()
    gone = removed(policy, grads_BU, 2, num_layers=layers, unit=unit, pinned=(0,))
    score = grads_BU.square().sum(0)
    best = max(policy.space, key=lambda kept: float(score[list(kept)].sum()))
    assert gone == sorted({*range(12)} - {*best})


def test_each_layer_loses_its_own_channels() -> None:
    grads_BU = noise(3 * 8)
    gone = removed(Fisher(), grads_BU, 3, num_layers=3, unit="channel", width=8)
    score_LW = grads_BU.square().sum(0).view(3, 8)
    for layer in range(3):
        lowest = sorted((8 * layer + score_LW[layer].argsort()[:3]).tolist())
        assert [unit for unit in gone if unit // 8 == layer] == lowest


@pytest.mark.parametrize("scale", [1e-9, 1e6])
def test_the_size_of_the_gradients_decides_nothing(scale: float) -> None:
    for policy in (Fisher(), Fisher(rearranged=True)):
        assert removed(policy, scale * noise(9), 3) == removed(policy, noise(9), 3)


def test_units_without_any_gradient_are_removed_and_cause_no_fault() -> None:
    assert removed(Fisher(), torch.zeros(2, 4).double(), 2) == [0, 1]
    assert len(removed(Fisher(rearranged=True), torch.zeros(2, 4).double(), 2)) == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("mode", [False, True])
def test_a_batch_that_overflowed_counts_for_nothing(mode: bool, bad: float) -> None:
    grads_BU = noise(6)
    broken_BU = torch.cat([grads_BU, torch.full((1, 6), bad).double().index_fill(1, torch.arange(3), 1.0)])
    assert removed(Fisher(mode), broken_BU, 2) == removed(Fisher(mode), grads_BU, 2)
    with pytest.raises(ConfigError, match="finite on no calibration batch"):
        removed(Fisher(mode), torch.full((2, 6), bad).double(), 2)


# ---------------------------------------------------------------------- the terms off the diagonal


def test_of_two_copies_only_the_terms_between_them_keep_one() -> None:
    """The diagonal removes both, which costs |2 a|^2 = 4; one copy and the orthogonal unit cost 1 + 1.44."""
    assert removed(Fisher(), COPIES, 2) == [0, 1]
    gone = removed(Fisher(rearranged=True), COPIES, 2)
    assert gone in ([0, 2], [1, 2])
    costs = {kept: cost(COPIES, kept) for kept in itertools.combinations(range(4), 2)}
    assert costs[2, 3] == 4
    assert min(costs.values()) == pytest.approx(2.44)
    assert cost(COPIES, tuple({*range(4)} - {*gone})) == pytest.approx(2.44)


@pytest.mark.parametrize("unit", ["kv_group", "channel"])
def test_copies_are_told_apart_within_each_layer(unit: Unit) -> None:
    """The second layer has the units in another order. Terms between the layers do not count."""
    grads_BU = torch.cat([COPIES, COPIES[:, [3, 1, 2, 0]]], 1)
    gone = removed(Fisher(rearranged=True), grads_BU, 2, num_layers=2, unit=unit, width=4)
    assert len(gone) == 4
    assert 2 in gone
    assert 6 in gone
    assert not {3, 4} & {*gone}


def literal(grads_BW: Tensor, remove: int) -> set[int]:
    """The rearrangement as the paper states it, one unit at a time."""
    order = grads_BW.square().sum(0).argsort(stable=True).tolist()
    gone = order[:remove]
    for unit in order[remove:]:
        pool = [unit, *gone]
        left = [float(sum(grads_BW[:, o] for o in pool if o != out).square().sum()) for out in pool]  # type: ignore[union-attr]
        pool.pop(min(range(len(pool)), key=left.__getitem__))
        gone = pool
    return {*gone}


@pytest.mark.parametrize("seed", range(6))
def test_groups_at_once_are_rearranged_as_one_by_one(seed: int) -> None:
    grads_BGW = noise(4 * 9, batches=6, seed=seed).view(6, 4, 9)
    kept_GW = rearranged(grads_BGW, 3).view(4, 9)
    assert set(kept_GW.flatten().tolist()) == {0.0, 1.0}
    for group in range(4):
        own_BW = grads_BGW[:, group]
        gone = {*(kept_GW[group] == 0).nonzero().flatten().tolist()}
        assert gone == literal(own_BW, 3)
        lowest = own_BW.square().sum(0).argsort()[3:].tolist()
        assert cost(own_BW, tuple({*range(9)} - gone)) <= cost(own_BW, tuple(lowest))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("space", [AnyOf(10, 7, (2,)), Alternating(10, 6, (4, 5))])
def test_exchanges_end_where_none_helps_and_find_the_best_of_nearly_all(space: Space, seed: int) -> None:
    grads_BU = noise(10, seed=seed)
    start = tuple(space.argmax(grads_BU.square().sum(0)).nonzero().flatten().tolist())
    end = exchanged(grads_BU, space, start)
    assert space.legal(end)
    assert cost(grads_BU, end) <= cost(grads_BU, start)
    assert all(cost(grads_BU, near) >= cost(grads_BU, end) for near in space.neighbours(end))


@pytest.mark.parametrize("sizes", [{}, {"num_layers": 6, "unit": "half"},
                                   {"num_layers": 3, "unit": "channel", "width": 4}])  # fmt: skip
def test_where_gradients_are_orthogonal_nothing_is_rearranged(sizes: dict[str, Any]) -> None:
    grads_BU = torch.diag(noise(12, batches=1)[0].abs() + 0.1)
    assert removed(Fisher(rearranged=True), grads_BU, 2, **sizes) == removed(Fisher(), grads_BU, 2, **sizes)


# ---------------------------------------------------------------------- the contract


@pytest.mark.parametrize("mode", [False, True])
def test_a_curriculum_removes_part_of_the_answer_and_a_checkpoint_holds_it(mode: bool) -> None:
    policy = Fisher(rearranged=mode, always_keep=[1])
    gone = removed(policy, noise(9), 4)
    assert 1 not in gone
    for now in range(1, 5):
        policy.remove = now
        closed = (policy.sample(3, 1) == 0).nonzero().flatten().tolist()
        assert len(closed) == now
        assert {*closed} <= {*gone}
    resumed = Fisher(rearranged=mode, always_keep=[1])
    resumed.setup(9, 4)
    resumed.load_state_dict(policy.state_dict())
    assert resumed.harden() == policy.harden()
    assert policy.surrogate(policy.sample(0, 0)[None], torch.ones(1), None) == 0


def test_scores_serve_every_size_and_a_rearranged_set_one(teacher_dir: str) -> None:
    sizes: dict[str, Any] = {"budgets": [0.25, 0.5]}
    MaskSearch(teacher_dir, Fisher(), **sizes)
    with pytest.raises(ConfigError, match="Fisher chooses for one count alone"):
        MaskSearch(teacher_dir, Fisher(rearranged=True), **sizes)


# ---------------------------------------------------------------------- the gradients


@pytest.mark.parametrize("unit", ["layer", "half", "channel"])
def test_one_pass_for_all_gates_gives_the_gradients_of_separate_backwards(
    unit: Unit, teacher_dir: str
) -> None:
    """By plain transformers: what a unit adds times its gate, the mean cross-entropy, one batch at a time."""
    probe = probe_of(teacher_dir, Fisher(), unit, 0.0)
    found_BU = probe.gate_gradients()
    assert found_BU.dtype == torch.float64
    assert found_BU.shape == (BATCHES, {"layer": 6, "half": 12, "channel": 6 * 24}[unit])
    model, layer = load_model(teacher_dir).requires_grad_(False), 3
    module = decoder_layers(model)[1][layer]
    gate = torch.ones(24 if unit == "channel" else 1, requires_grad=True)
    if unit == "layer":
        module.register_forward_hook(lambda _, args, out: args[0] + gate * (out - args[0]))
    elif unit == "half":
        module.mlp.register_forward_hook(lambda _, args, out: gate * out)
    else:
        module.mlp.down_proj.register_forward_pre_hook(lambda _, args: (gate * args[0],))
    at = {"layer": [3], "half": [7], "channel": list(range(3 * 24, 4 * 24))}[unit]
    for batch, found_U in zip(batches(), found_BU[:, at], strict=True):
        loss = model(**batch).loss
        (expected,) = torch.autograd.grad(loss, gate)
        torch.testing.assert_close(found_U.float(), expected, rtol=2e-4, atol=1e-6)


def test_a_batch_of_two_ranks_is_one_batch(teacher_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rank reads the next batch: both count by their supervised tokens."""
    alone = probe_of(teacher_dir, Fisher(), "layer", 0.0)
    every_BU, counts = alone.gate_gradients(), torch.tensor([len(rows) for rows in alone.rows]).double()
    first, second = slice(0, None, 2), slice(1, None, 2)
    ranks = probe_of(teacher_dir, Fisher(), "layer", 0.0, rows=lambda: batches()[first])
    others = iter([torch.zeros(()), counts[second, None] * every_BU[second], counts[second, None]])

    def reduce(x: Tensor, reduce_op: str) -> Tensor:
        return x if reduce_op == "max" and next(others) is not None else x + next(others)

    monkeypatch.setattr(ranks.search.trainer.strategy, "reduce", reduce)
    expected = (counts[:, None] * every_BU).unflatten(0, (-1, 2)).sum(1) / counts.view(-1, 2).sum(1)[:, None]
    torch.testing.assert_close(ranks.gate_gradients(), expected)


def test_salience_leaves_out_batches_that_overflowed() -> None:
    """Whatever starts or sorts by it (GRAIN, Prune and Merge, Gumbel-TopK) is safe with it."""
    broken_BU = torch.cat([noise(6), torch.full((2, 6), math.nan).double()])
    assert torch.equal(salience(Known(broken_BU), 6), salience(Known(noise(6)), 6))
    with pytest.raises(ConfigError, match="finite on no calibration batch"):
        salience(Known(broken_BU[-2:]), 6)


def test_salience_is_the_mean_over_batches_of_their_sizes() -> None:
    grads_BU = noise(7)
    torch.testing.assert_close(salience(Known(grads_BU), 7), grads_BU.abs().mean(0).float())
