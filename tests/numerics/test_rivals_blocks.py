"""Laws of the categorical choice in blocks of layers (TinyFusion)."""

from __future__ import annotations

import math

import pytest
import torch

from src.errors import ConfigError
from src.policies import ConcaveGate, TinyFusion
from src.policies.measuring import Probe
from src.policies.settle import settle
from src.policies.tinyfusion import ways_to_keep
from tests.numerics.test_rivals_gates import additive, learn


def made(layers: int, remove: int, **keys: object) -> TinyFusion:
    policy = TinyFusion(**keys)  # type: ignore[arg-type]
    policy.setup(layers, remove)
    return policy


def test_the_ways_of_a_block_are_all_subsets() -> None:
    ways = ways_to_keep(4, 2)
    assert len({tuple(row) for row in ways.tolist()}) == math.comb(4, 2) == len(ways)
    assert (ways.sum(1) == 2).all()


@pytest.mark.parametrize(
    ("layers", "remove", "blocks"),
    [
        (16, 4, [(4, 1)] * 4),  # 3:4, four times
        (16, 8, [(4, 2)] * 4),
        (16, 2, [(8, 1)] * 2),  # no more blocks than layers to remove
        (22, 5, [(5, 1), (5, 1), (4, 1), (4, 1), (4, 1)]),
        (6, 2, [(6, 2)]),
    ],
)
def test_blocks_share_the_layers_and_the_removals(
    layers: int, remove: int, blocks: list[tuple[int, int]]
) -> None:
    policy = made(layers, remove)
    assert [(ways.shape[1], int(ways.shape[1] - ways[0].sum())) for ways in policy.ways] == blocks
    assert len(policy.logits) == sum(math.comb(m, n) for m, n in blocks)


def test_draws_remove_the_exact_count_of_each_block_and_spare_the_pinned() -> None:
    policy = TinyFusion(always_keep=[0, -1])
    policy.setup(18, 4)
    for step in range(50):
        gates = policy.sample(step, 0).detach()
        assert set(gates.tolist()) == {0.0, 1.0}
        assert gates[0] == gates[17] == 1
        assert [int(4 - block.sum()) for block in gates[1:17].split(4)] == [1, 1, 1, 1]
    assert torch.equal(policy.sample(3, 1), policy.sample(3, 1)), "a function of seed, step and draw"


def test_the_law_is_the_categorical_one() -> None:
    policy = made(4, 1, block=4, scale=1.0)
    with torch.no_grad():
        policy.logits.copy_(torch.tensor([0.0, 1.0, -1.0, 2.0]))
    probability = policy.logits.detach().softmax(0)  # way i removes layer i
    rate = torch.stack([1 - policy.sample(step, 0).detach() for step in range(4000)]).mean(0)
    assert ((rate - probability).abs() < 5 * (probability * (1 - probability) / 4000).sqrt()).all()
    torch.testing.assert_close(policy.keep_probabilities(), 1 - probability)
    assert policy.harden() == (0, 1, 2)


def test_the_gradient_is_that_of_the_softmax_at_the_temperature() -> None:
    """By hand: d gates / d logits = scale / tau x ways^T (diag y - y y^T)."""
    policy = made(4, 2, block=4, scale=3.0, temperature=0.7)
    noise = policy.generator(0, 0)
    u = torch.rand(6, generator=noise).clamp(1e-20, 1 - 1e-7)
    y = torch.softmax((3.0 * policy.logits.detach() - torch.log(-torch.log(u))) / 0.7, 0)
    pull = torch.tensor([1.0, -2.0, 0.5, 3.0])
    (grad,) = torch.autograd.grad(policy.sample(0, 0) @ pull, policy.logits)
    values = policy.ways[0] @ pull
    torch.testing.assert_close(grad, 3.0 / 0.7 * y * (values - y @ values))


def test_it_finds_the_cheapest_way_of_each_block() -> None:
    value, cost = additive(8)
    policy = made(8, 2)
    learn(policy, cost, torch.optim.AdamW([policy.logits], lr=1e-3, weight_decay=0), range(200), 4)
    expected = {int(block.argmin()) + 4 * b for b, block in enumerate(value.split(4))}
    assert set(range(8)) - set(policy.harden()) == expected


def test_what_does_not_go_is_told() -> None:
    with pytest.raises(ConfigError, match=r"policy\.block"):
        made(40, 12, block=40)
    policy = made(8, 2)
    policy.remove = 1
    with pytest.raises(ConfigError, match="PruningCurriculum"):
        policy.sample(0, 0)


@pytest.mark.parametrize("policy", [TinyFusion(), ConcaveGate()])
def test_swaps_have_a_worth_for_each_layer_where_logits_are_of_something_else(
    policy: TinyFusion | ConcaveGate,
) -> None:
    """So that the method's answer can be polished: the layer least worth keeping is swapped out first."""
    policy.setup(6, 4)
    assert len(policy.logits) != 6
    _, cost = additive(6)

    class Costs(Probe):
        def divergence(self, gates_L: torch.Tensor, quick: bool = False) -> float:
            return float(cost(gates_L))

    policy.polish = True
    chosen, figures = settle(policy, Costs(), ())
    cheapest = sorted(range(6), key=lambda i: float(cost(policy.gates(set(range(6)) - {i}))))
    assert set(range(6)) - set(chosen) == set(cheapest[:4])
    assert figures["kl"] <= figures["kl_learned"]
