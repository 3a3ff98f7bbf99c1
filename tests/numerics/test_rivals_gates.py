"""Laws of the learned rivals with relaxed gates: L0 gates and a movable window; and that all resume."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from src.errors import ConfigError
from src.policies import BypassBP, ConcaveGate, HardConcrete, MaskPolicy
from src.policies.concave import removed_shares
from src.policies.measuring import Probe

Cost = Callable[[Tensor], Tensor]


def learn(asked: MaskPolicy, cost: Cost, optimizer: torch.optim.Optimizer, steps: range, draws: int) -> None:
    """The search's loop on a toy; the temperature falls from 2 to 0.05 over 100 steps."""
    for step in steps:
        asked.temperature = 2.0 * (0.05 / 2.0) ** min(1.0, step / 100)
        gates = torch.stack([asked.sample(step, d) for d in range(draws)])
        leaf = gates.detach().requires_grad_()
        losses = torch.stack([cost(row) for row in leaf])
        (grads,) = torch.autograd.grad(losses.sum(), leaf)
        optimizer.zero_grad()
        told = grads if asked.needs_gradient else None
        asked.surrogate(gates, losses.detach(), told).backward()
        optimizer.step()


def additive(layers: int, seed: int = 0) -> tuple[Tensor, Cost]:
    value = torch.rand(layers, generator=torch.Generator().manual_seed(seed))
    return value, lambda gates: (1 - gates) @ value


# ---------------------------------------------------------------- hard concrete


def test_the_expected_count_of_open_gates_is_the_rate_of_the_draws() -> None:
    asked = HardConcrete()
    asked.setup(4, 2)
    with torch.no_grad():
        asked.logits.copy_(torch.tensor([-3.0, -1.0, 0.0, 2.0]))
        gates = torch.stack([asked.sample(step, 0) for step in range(4000)])
    assert gates.min() == 0
    assert gates.max() == 1
    assert ((gates > 0) & (gates < 1)).any()
    rate, p = (gates > 0).float().mean(0), asked.open_probabilities().detach()
    assert ((rate - p).abs() < 5 * (p * (1 - p) / 4000).sqrt()).all()


@pytest.mark.parametrize(("log_alpha", "sign"), [(3.0, 1), (-6.0, -1)])
def test_multipliers_rise_while_too_few_layers_go_and_fall_while_too_many(
    log_alpha: float, sign: int
) -> None:
    asked = HardConcrete(log_alpha=log_alpha)
    asked.setup(8, 3)
    excess = float(asked.open_probabilities().detach().sum()) - 5
    assert excess * sign > 0
    optimizer = torch.optim.SGD(asked.parameters(), lr=0.1)
    asked.surrogate(asked.sample(0, 0)[None], torch.zeros(1), torch.zeros(1, 8)).backward()
    optimizer.step()
    # Gradient ascent on m_1 d + m_2 d^2.
    torch.testing.assert_close(asked.multipliers.detach(), 0.1 * torch.tensor([excess, excess**2]))


def test_the_penalty_pulls_the_expected_count_to_the_target() -> None:
    asked = HardConcrete()
    asked.setup(8, 3)
    with torch.no_grad():
        asked.multipliers.copy_(torch.tensor([0.5, 0.25]))
    (grad,) = torch.autograd.grad(
        asked.surrogate(asked.sample(0, 0)[None], torch.zeros(1), torch.zeros(1, 8)), asked.logits
    )
    p = asked.open_probabilities()
    excess = float(p.detach().sum()) - 5
    (slope,) = torch.autograd.grad(p.sum(), asked.logits)
    torch.testing.assert_close(grad, (0.5 + 2 * 0.25 * excess) * slope)


def test_hard_concrete_meets_the_count_and_finds_the_layers_that_stand_out() -> None:
    value = torch.tensor([1.0, 0.2, 0.9, 1.2, 0.1, 0.8, 0.0, 1.1, 0.3, 1.3])
    asked = HardConcrete(always_keep=[6])
    asked.setup(10, 3)
    optimizer = torch.optim.Adam(asked.parameters(), lr=0.1)
    learn(asked, lambda gates: (1 - gates) @ value, optimizer, range(300), draws=4)
    assert set(range(10)) - set(asked.harden()) == {1, 4, 8}  # the cheapest layer, 6, may not go
    assert abs(float(asked.open_probabilities().detach().sum()) - 6) < 0.1
    assert asked.keep_probabilities()[6] == asked.sample(0, 0)[6] == 1


def test_the_target_follows_the_curriculum() -> None:
    asked = HardConcrete(log_alpha=30.0)
    asked.setup(8, 3)
    moved = []
    for asked.remove in (1, 3):
        loss = asked.surrogate(asked.sample(0, 0)[None], torch.zeros(1), torch.zeros(1, 8))
        moved.append(float(torch.autograd.grad(loss, asked.multipliers)[0][0]))
    assert moved == [-1.0, -3.0]


# ---------------------------------------------------------------- concave window


@pytest.mark.parametrize("tau", [2.0, 1.0, 0.3, 0.05])
def test_a_window_removes_exactly_k_layers_wherever_it_is(tau: float) -> None:
    asked = ConcaveGate(temperature=tau)
    asked.setup(12, 4)
    for start in range(9):
        asked.place([start])
        gates = asked.sample(0, 0).detach()
        assert abs(float((1 - gates).sum()) - 4) < 1e-4
        assert gates.min() >= 0
        assert gates.max() <= 1
        window = tuple(i for i in range(12) if not start <= i < start + 4)
        assert asked.harden() == window
        if tau == 0.05:
            assert (gates - asked.gates(window)).abs().max() < 1e-3


@pytest.mark.parametrize("places", [[-9.0, 9.0], [0.0, 0.0], [0.3, -0.2], [9.0, 9.0]])
def test_several_segments_share_the_count_even_where_they_meet(places: list[float]) -> None:
    asked = ConcaveGate(segments=2, always_keep=[0, -1])
    asked.setup(13, 5)
    with torch.no_grad():
        asked.logits.copy_(torch.tensor(places))
    for asked.temperature in (2.0, 0.05):
        gates = asked.sample(0, 0).detach()
        assert abs(float((1 - gates).sum()) - 5) < 1e-4
        assert gates[0] == gates[-1] == 1
    assert len(asked.harden()) == 8
    assert {0, 12} <= set(asked.harden())
    if places[0] == -9.0:
        assert asked.harden() == (0, 4, 5, 6, 7, 8, 9, 12)


def test_the_level_has_the_implicit_gradient() -> None:
    height = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for tau in (2.0, 0.3):
        assert torch.autograd.gradcheck(lambda h, tau=tau: removed_shares(h, 3, tau), height)


class Oracle(Probe):
    """A divergence over masks, and the best start by trying all."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.asked = value, 0

    def cost(self, gates: Tensor) -> Tensor:
        gone = 1 - gates
        return gone @ self.value + 0.1 * (gone @ self.value) ** 2

    def divergence(self, gates: Tensor, quick: bool = False) -> float:
        assert quick
        self.asked += 1
        return float(self.cost(gates))


@pytest.mark.parametrize("best", [0, 3, 7, 9, 12])
@pytest.mark.parametrize("start", ["scan", "random"])
def test_the_window_ends_where_a_scan_of_all_starts_ends(best: int, start: str) -> None:
    """Also at the ends of the model. A random start is led down one valley, a scan chooses between two."""
    layers, k = 16, 4
    place = torch.arange(layers)
    value = 0.2 + 0.02 * (place - (best + 1.5)).abs()
    if start == "scan":
        value = value + 0.05 * torch.cos(0.8 * place)
    oracle = Oracle(value)
    scan = [float(oracle.cost(1 - ((place >= s) & (place < s + k)).float())) for s in range(layers - k + 1)]
    found = scan.index(min(scan))
    asked = ConcaveGate(start=start, seed=3)
    asked.setup(layers, k)
    asked.initialise(oracle)
    assert oracle.asked == (7 if start == "scan" else 0)  # 0, 2, ..., 12: fewer than all 13
    learn(asked, oracle.cost, torch.optim.Adam(asked.parameters(), lr=0.1), range(120), draws=1)
    assert asked.harden() == tuple(i for i in range(layers) if not found <= i < found + k)


def test_more_segments_than_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"policy.segments: 3 asked for 2 layers. Accepted: 1 to 2"):
        ConcaveGate(segments=3).setup(9, 2)


# ---------------------------------------------------------------- all of them


@pytest.mark.parametrize("policy", [HardConcrete, ConcaveGate, BypassBP])
def test_a_resumed_search_continues_to_the_last_bit(policy: type[MaskPolicy]) -> None:
    _, cost = additive(9)

    def fresh() -> tuple[MaskPolicy, torch.optim.Optimizer]:
        asked = policy(seed=7)
        asked.setup(9, 3)
        return asked, torch.optim.Adam(asked.parameters(), lr=0.05)

    whole, optimizer = fresh()
    learn(whole, cost, optimizer, range(12), draws=3)
    half, optimizer = fresh()
    learn(half, cost, optimizer, range(5), draws=3)
    rest, again = fresh()
    rest.load_state_dict(half.state_dict())
    again.load_state_dict(optimizer.state_dict())
    learn(rest, cost, again, range(5, 12), draws=3)
    assert whole.state_dict().keys() == rest.state_dict().keys()
    assert all(torch.equal(value, rest.state_dict()[key]) for key, value in whole.state_dict().items())
    assert whole.harden() == rest.harden()
