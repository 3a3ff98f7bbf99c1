"""Laws of the training-free rivals: each definition on a case worked by hand, exact counts, constraints."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from src.errors import ConfigError
from src.optim import SharedAdam
from src.policies import (
    AngularDistance,
    BlockInfluence,
    GumbelTopK,
    LayerKL,
    MaskPolicy,
    OneShotPerplexity,
    Streamline,
    Tail,
    Taylor,
)
from src.policies.measuring import Probe

RIVALS = [AngularDistance, BlockInfluence, LayerKL, OneShotPerplexity, Streamline, Tail, Taylor]


class Fake(Probe):
    """A probe with a given residual stream, given weights, and a cost for each layer that is missing."""

    def __init__(self, streams: Any = (), costs: Any = (), layers: Any = ()) -> None:
        self.streams, self.costs, self.layers = streams, costs, layers
        self.asked: list[list[float]] = []

    def divergence(self, gates_L: Tensor, quick: bool = False) -> float:
        return self.cross_entropy(gates_L)

    def cross_entropy(self, gates_L: Tensor) -> float:
        self.asked.append(gates_L.tolist())
        return sum(cost for cost, gate in zip(self.costs, gates_L.tolist(), strict=True) if gate == 0)

    def states(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self.streams

    def mean(self, sums: Tensor, counts: Tensor) -> Tensor:
        return sums / counts

    def share(self, layer: int, name: str, values: Tensor) -> Tensor:
        return values.sum()[None]

    def gradients(self, visit: Callable[[int, nn.Module], None]) -> None:
        for index, layer in enumerate(self.layers):
            visit(index, layer)


def stream(*rows: list[list[float] | None]) -> tuple[Tensor, Tensor]:
    """A batch from the direction in degrees of each token at each place J; None is padding.

    The lengths differ, because cosines do not see them; padding turns by a right angle at each layer.
    """
    real = torch.tensor([[token is not None for token in row] for row in rows])
    places = max(len(token) for row in rows for token in row if token is not None)
    noise = [90.0 * j for j in range(places)]
    angles_BTJ = torch.tensor([[noise if t is None else t for t in row] for row in rows]).deg2rad()
    length = 1 + torch.arange(angles_BTJ.numel()).reshape(angles_BTJ.shape)
    h_BTJH = torch.stack([angles_BTJ.cos() * length, angles_BTJ.sin() * length], -1)
    return h_BTJH.permute(2, 0, 1, 3), real


def random_probe(layers: int, seed: int = 0) -> Fake:
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for rows in (3, 2):
        lengths = torch.randint(1, 6, (rows, 1), generator=generator)
        h_JBTH = torch.randn(layers + 1, rows, 5, 4, generator=generator).cumsum(0)
        batches.append((h_JBTH, torch.arange(5) < lengths))
    modules: list[nn.Module] = []
    for _ in range(layers):
        module = nn.Linear(3, 2)
        for p in module.parameters():
            p.data = torch.randn(p.shape, generator=generator)
            p.grad = torch.randn(p.shape, generator=generator)
        modules.append(module)
    return Fake(batches, torch.rand(layers, generator=generator).tolist(), modules)


def removed(policy: MaskPolicy, probe: Fake, layers: int, remove: int, pinned: Any = ()) -> list[int]:
    policy.setup(layers, remove, pinned)
    policy.initialise(probe)
    return [i for i in range(layers) if i not in policy.harden()]


def test_block_influence_is_the_mean_turn_of_the_real_tokens() -> None:
    # Layer 0 turns the tokens by 60, 0, 90 degrees; layer 1 by 60, 60, 0. Two batches, unlike counts.
    probe = Fake([stream([[0, 60, 120], None], [[10, 10, 70], None]), stream([[0, 90, 90]])])
    policy = BlockInfluence()
    assert removed(policy, probe, 2, 1) == [1]
    torch.testing.assert_close(policy.logits.detach(), torch.tensor([1.5, 1.0]) / 3)


def test_perplexity_is_the_loss_without_that_one_layer() -> None:
    probe = Fake(costs=[3.0, 0.5, 2.0, 0.25, 1.0])
    policy = OneShotPerplexity(always_keep=[3])
    assert removed(policy, probe, 5, 2) == [1, 4]
    # One measurement for each layer that may go, each with that layer alone closed.
    assert probe.asked == [[float(i != layer) for i in range(5)] for layer in (0, 1, 2, 4)]


def test_perplexity_and_kl_find_the_best_subset_where_costs_add_up() -> None:
    probe = random_probe(8)
    best = min(itertools.combinations(range(1, 8), 3), key=lambda gone: sum(probe.costs[i] for i in gone))
    for policy in (OneShotPerplexity(), LayerKL(), GumbelTopK(init="kl")):  # the last: where it starts
        assert removed(policy, probe, 8, 3, pinned=(0,)) == list(best)


def test_taylor_sums_the_absolute_products_of_weights_and_gradients() -> None:
    def layer(weight: list[float], grad: list[float], bias: float) -> nn.Module:
        module = nn.Linear(2, 1)
        module.weight.data, module.weight.grad = Tensor([weight]), Tensor([grad])
        module.bias.data, module.bias.grad = Tensor([bias]), Tensor([bias])
        return nn.Sequential(module, nn.LayerNorm(2))  # the norm's weight has no gradient here

    # Signs must not cancel (layer 0), and biases do not count (layer 1).
    layers = [layer([1, -2], [3, 1.5], 0), layer([2, 0], [0.5, 9], 9), layer([-1, 1], [2, 2], 0)]
    policy = Taylor()
    assert removed(policy, Fake(layers=layers), 3, 1) == [1]
    assert policy.logits.tolist() == [6.0, 1.0, 4.0]


def test_taylor_plus_protects_the_first_four_and_the_last_two() -> None:
    probe = random_probe(9)
    assert removed(Taylor(plus=True), probe, 9, 3) == [4, 5, 6]
    with pytest.raises(ConfigError, match="Accepted: 1 to 3"):
        Taylor(plus=True).setup(9, 4)


def test_angular_distance_looks_at_the_last_real_token_and_streamline_at_all() -> None:
    # The last tokens turn little in layers 2 and 3, the others in layers 0 and 1.
    early, late = [0.0, 1, 2, 90, 180], [0.0, 90, 180, 181, 182]
    probe = Fake([stream([early, early, late, None], [early, late, None, None])])
    assert removed(AngularDistance(), probe, 4, 2) == [2, 3]
    assert removed(Streamline(), probe, 4, 2) == [0, 1]
    # Padding on the left: the last token is the last all the same.
    assert removed(AngularDistance(), Fake([stream([None, early, late])]), 4, 2) == [2, 3]


def test_windows_are_judged_by_what_enters_and_what_leaves() -> None:
    """Layers 1 and 2 turn far, but back again: worst one by one, best as a pair."""
    probe = Fake([stream([[0.0, 30, 120, 31, 60]])])
    assert removed(BlockInfluence(), probe, 4, 2) == [0, 3]
    assert removed(Streamline(), probe, 4, 2) == removed(AngularDistance(), probe, 4, 2) == [1, 2]


@pytest.mark.parametrize("degrees", [0.0, 0.01, 60, 90, 179.99])
def test_the_angle_is_in_half_turns_and_exact_when_small(degrees: float) -> None:
    h_JBTH, real_BT = stream([[0.0, degrees]])
    found = AngularDistance().change(h_JBTH[:1], h_JBTH[1:], real_BT)
    torch.testing.assert_close(found, torch.tensor([[degrees / 180]]), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("seed", "remove"), itertools.product(range(3), (1, 2, 4, 6)))
def test_the_window_is_the_best_of_all_by_brute_force(seed: int, remove: int) -> None:
    probe = random_probe(8, seed)

    def cosines(last: bool, start: int) -> list[float]:
        found = []
        for h_JBTH, real_BT in probe.streams:
            for b, row in enumerate(real_BT):
                tokens = torch.nonzero(row).flatten().tolist()
                for t in tokens[-1:] if last else tokens:
                    u, v = h_JBTH[start, b, t], h_JBTH[start + remove, b, t]
                    found.append(float(u @ v / u.norm() / v.norm()))
        return found

    angle = [sum(map(math.acos, cosines(True, start))) for start in range(9 - remove)]
    cosine = [-sum(cosines(False, start)) for start in range(9 - remove)]
    for policy, total in ((AngularDistance(), angle), (Streamline(), cosine)):
        start = total.index(min(total))
        assert removed(policy, probe, 8, remove) == list(range(start, start + remove))
    if remove == 1:  # a window of one layer
        assert removed(BlockInfluence(), probe, 8, 1) == removed(Streamline(), probe, 8, 1)


def test_a_window_goes_round_the_layers_that_must_stay() -> None:
    probe = Fake([stream([[0.0, 50, 51, 52, 53, 100, 150]])])  # layers 1 to 3 turn least
    assert removed(Streamline(), probe, 6, 2) == [1, 2]
    assert removed(Streamline(always_keep=[1]), probe, 6, 2) == [2, 3]
    assert removed(AngularDistance(), probe, 6, 2, pinned=(1, 2)) == [3, 4]


@pytest.mark.parametrize("kind", [AngularDistance, Streamline])
def test_a_window_that_fits_nowhere_is_refused(kind: type[MaskPolicy]) -> None:
    with pytest.raises(ConfigError, match=r"4 neighbouring layers .* \[0, 1, 3, 4, 5\] .*always_keep"):
        kind(always_keep=[2]).setup(6, 4)


def test_tail_removes_the_last_layers() -> None:
    assert removed(Tail(), Fake(), 6, 2) == [4, 5]
    assert removed(Tail(keep_last=True), Fake(), 6, 2) == [3, 4]
    assert removed(Tail(keep_last=True, always_keep=[3]), Fake(), 6, 2) == [2, 4]
    assert removed(Tail(), Fake(), 6, 2, pinned=(5,)) == [3, 4]


@pytest.mark.parametrize("kind", RIVALS)
@pytest.mark.parametrize("remove", [1, 2, 3])
def test_counts_are_exact_and_constraints_hold(kind: type[MaskPolicy], remove: int) -> None:
    policy = kind(always_keep=[0], seed=3)
    gone = removed(policy, random_probe(8), 8, remove, pinned=(4,))
    assert len(gone) == remove
    assert not {0, 4} & set(gone)
    for now in range(1, remove + 1):  # while a curriculum runs, part of the final answer
        policy.remove = now
        gates = policy.sample(7, 1)
        assert set(gates.tolist()) == {0.0, 1.0}
        assert (gates == 0).sum() == now
        assert set(torch.nonzero(gates == 0).flatten().tolist()) <= set(gone)
        assert torch.equal(gates, policy.sample(0, 0))
        assert len(policy.harden()) == 8 - remove
    assert torch.equal(gates, policy.gates(policy.harden()))


@pytest.mark.parametrize("kind", RIVALS)
@pytest.mark.parametrize("optimizer", [SharedAdam, torch.optim.Adam])
def test_a_step_moves_nothing_and_a_checkpoint_holds_the_answer(
    kind: type[MaskPolicy], optimizer: type[torch.optim.Optimizer]
) -> None:
    policy = kind()
    removed(policy, random_probe(8), 8, 3)
    before = policy.logits.detach().clone()
    steps = optimizer(policy.parameters(), lr=1.0)  # type: ignore[call-arg]
    for step in range(2):
        loss = policy.surrogate(policy.sample(step, 0)[None], torch.tensor([math.nan]), None)
        assert loss == 0
        steps.zero_grad()
        loss.backward()
        steps.step()
    assert torch.equal(policy.logits, before)
    resumed = kind()
    resumed.setup(8, 3)
    resumed.load_state_dict(policy.state_dict())
    assert resumed.harden() == policy.harden()


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_layer_without_which_nothing_finite_is_left_stays(broken: float) -> None:
    policy = OneShotPerplexity()
    assert removed(policy, Fake(costs=[broken, 2.0, 1.0, broken]), 4, 2) == [1, 2]
    assert policy.nothing() == 0
