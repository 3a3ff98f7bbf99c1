"""Laws of the mask policies: exact counts, exact values, gradients against closed forms and enumeration."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from src.errors import ConfigError
from src.policies import BlockInfluence, ConcaveGate, GumbelTopK, Tail
from src.policies import relaxations as R
from src.policies.angular import AngularDistance
from src.policies.measuring import Probe
from src.units.spaces import AnyOf
from tests.marks import slow

FORMS = ("softmax", "successive", "simple", "sigmoid", "identity")


def policy(remove: int = 3, layers: int = 9, **keys: object) -> GumbelTopK:
    made = GumbelTopK(init="zeros", **keys)
    made.setup(layers, remove)
    with torch.no_grad():
        made.logits.copy_(torch.randn(layers, generator=torch.Generator().manual_seed(1)))
    return made


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", ["prune", "keep"])
def test_every_draw_removes_exactly_n_and_is_exactly_binary(form: str, side: str) -> None:
    asked = policy(form=form, side=side, always_keep=[0, -1])
    for step, remove in itertools.product(range(20), (1, 2, 3)):
        asked.remove = remove
        gates = asked.sample(step, 0)
        assert set(gates.tolist()) <= {0.0, 1.0}
        assert (gates == 0).sum() == remove
        assert gates[0] == gates[-1] == 1.0
        assert gates.requires_grad


@pytest.mark.parametrize("form", FORMS)
def test_a_draw_depends_on_seed_step_and_draw_only(form: str) -> None:
    one, other = policy(form=form), policy(form=form)
    torch.rand(7)  # the global generator must not matter
    assert torch.equal(one.sample(5, 2), other.sample(5, 2))
    draws = {tuple(one.sample(step, draw).tolist()) for step in range(8) for draw in range(4)}
    assert len(draws) > 5


@pytest.mark.parametrize("form", ["softmax", "successive", "sigmoid"])
def test_temperature_never_changes_what_is_drawn(form: str) -> None:
    asked = policy(form=form)
    draws = []
    for tau in (0.1, 1.0, 4.0):
        asked.temperature = tau
        draws.append(asked.sample(3, 0).detach())
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[1], draws[2])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", ["prune", "keep"])
def test_removing_a_layer_that_helps_lowers_its_logit(form: str, side: str) -> None:
    """Both sides learn in the same direction: a gate whose closing lowers the loss loses logit."""
    asked = policy(form=form, side=side)
    asked.temperature = 1.0
    harmful = 4
    total = torch.zeros(9)
    for step in range(64):
        gates = asked.sample(step, 0)
        (grad,) = torch.autograd.grad(gates[harmful] * 1.0, asked.logits)
        total += grad
    assert total[harmful] > 0
    assert total.argmax() == harmful


@pytest.mark.parametrize("form", ["softmax", "successive", "simple", "sigmoid", "identity"])
@pytest.mark.parametrize("side", ["prune", "keep"])
def test_draws_of_halves_are_legal_and_their_gradient_is_that_of_the_form(form: Any, side: Any) -> None:
    """Halves that stay pair up at each draw; removing a half that does harm is what the gradient asks for."""
    asked = GumbelTopK(form=form, side=side, always_keep=[0])
    asked.setup(6, 2, unit="half")
    for step in range(10):
        gates = asked.sample(step, 0)
        assert asked.space.legal(gates.detach().nonzero().flatten().tolist())
        assert gates.detach()[:2].eq(1).all(), "both halves of a layer that must stay"
    assert asked.space.legal(asked.harden())
    assert float(asked.keep_probabilities().sum()) == pytest.approx(8, abs=1e-5)
    (grad,) = torch.autograd.grad(asked.sample(3, 0)[5], asked.logits)
    assert grad[5] > 0 or form in ("softmax", "successive", "sigmoid")
    assert grad[:2].eq(0).all() or form == "simple"


@pytest.mark.parametrize("policy", [AngularDistance, Tail, ConcaveGate, BlockInfluence])
def test_a_method_of_whole_layers_refuses_halves_before_anything_is_loaded(policy: type) -> None:
    with pytest.raises(ConfigError, match=r"model\.unit: 'half'"):
        policy().setup(6, 2, unit="half")


def test_softmax_form_has_the_closed_form_gradient() -> None:
    z, g, tau = torch.randn(6).requires_grad_(), torch.randn(6), 0.7
    y = torch.softmax(z / tau, 0)
    (grad,) = torch.autograd.grad(R.straight_through(AnyOf(6, 2).argmax(z), R.softmax_form(z, 2, tau)) @ g, z)
    torch.testing.assert_close(grad, y * (g - y @ g) / tau)


def test_sigmoid_form_has_the_closed_form_gradient() -> None:
    z, g, tau = torch.tensor([0.3, -1.0, 2.0, 0.9]).requires_grad_(), torch.randn(4), 0.7
    y = torch.sigmoid((z - (0.9 + 0.3) / 2) / tau)
    (grad,) = torch.autograd.grad(R.sigmoid_form(z, 2, tau) @ g, z)
    torch.testing.assert_close(grad, y * (1 - y) * g / tau)


@pytest.mark.parametrize("tau", [4.0, 1.0, 0.1])
def test_successive_form_has_mass_q(tau: float) -> None:
    z = torch.randn(8, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(R.successive_form(z, 3, tau).sum(), torch.tensor(3.0))


def test_a_random_start_is_standardised_and_follows_the_seed() -> None:
    def start(seed: int) -> torch.Tensor:
        asked = GumbelTopK(init="random", init_scale=2.0, always_keep=[0], seed=seed)
        asked.setup(9, 3)
        asked.initialise(None)  # type: ignore[arg-type]  # nothing is measured
        return asked.logits.detach()[1:]

    assert torch.equal(start(0), start(0))
    assert not torch.equal(start(0), start(1))
    torch.testing.assert_close(start(0).mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(start(0).std(correction=0), torch.tensor(2.0))


def test_harden_keeps_the_highest_logits_and_the_constrained() -> None:
    made = policy(remove=2, layers=5, always_keep=[0])
    with torch.no_grad():
        made.logits.copy_(torch.tensor([-9.0, 3.0, 1.0, 2.0, 0.0]))
    assert made.harden() == (0, 1, 3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", ["prune", "keep"])
@pytest.mark.parametrize(("remove", "kept"), [(2, [0, 1, 2]), (1, [0, 1, 2, 3])])
def test_a_forced_choice_is_made(form: str, side: str, remove: int, kept: list[int]) -> None:
    """A family whose tail alone may go leaves exactly as many free layers as are to be removed."""

    class Flat(Probe):
        def divergence(self, gates_L: torch.Tensor, quick: bool = False) -> float:
            return 0.5

    asked = GumbelTopK(form=form, side=side)
    asked.setup(5, remove, pinned=kept)
    asked.initialise(Flat())
    assert asked.sample(0, 0).tolist() == [float(i in kept) for i in range(5)]
    assert asked.sample(0, 0).requires_grad
    assert asked.harden() == tuple(kept)
    assert torch.equal(asked.keep_probabilities().round(), asked.gates(kept))
    assert asked.logits.isfinite().all()


@pytest.mark.parametrize("remove", [0, -1, 5, 9])
def test_an_impossible_count_is_refused(remove: int) -> None:
    with pytest.raises(ConfigError, match="remove"):
        GumbelTopK().setup(5, remove)


def test_constraints_that_leave_too_few_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="Accepted: 1 to 2"):
        GumbelTopK(always_keep=[0, 1, 2]).setup(5, 3)
    with pytest.raises(ConfigError, match="always_keep"):
        GumbelTopK(always_keep=[7]).setup(5, 3)


class Toy:
    """Quadratic removal cost with neighbour interaction, optimum by exhaustion."""

    def __init__(self, seed: int, layers: int = 12, remove: int = 3) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.alone = torch.rand(layers, generator=generator).exp() - 0.9
        self.pairs = 0.6 * torch.rand(layers, generator=generator)
        self.layers, self.remove = layers, remove

    def cost(self, gates: torch.Tensor) -> torch.Tensor:
        gone = 1 - gates
        return gone @ self.alone + (gone * gone.roll(-1) * self.pairs).sum()

    def optimum(self) -> float:
        best = math.inf
        for subset in itertools.combinations(range(self.layers), self.remove):
            gates = torch.ones(self.layers)
            gates[list(subset)] = 0.0
            best = min(best, float(self.cost(gates)))
        return best


@pytest.mark.parametrize("form", ["softmax", "successive", slow("simple")])
def test_the_search_ends_near_the_optimum_of_a_toy(form: str) -> None:
    from src.optim import SharedAdam

    ratios = []
    for seed in range(3):
        toy = Toy(seed)
        asked = GumbelTopK(form=form, init="zeros", seed=seed)
        asked.setup(toy.layers, toy.remove)
        optimizer = SharedAdam([asked.logits], lr=0.1)
        for step in range(150):
            asked.temperature = 4 + (0.1 - 4) * step / 149
            gates = torch.stack([asked.sample(step, d) for d in range(4)])
            grads = []
            for row in gates.detach():
                leaf = row.requires_grad_()
                grads.append(torch.autograd.grad(toy.cost(leaf), leaf)[0])
            optimizer.zero_grad()
            asked.surrogate(gates, torch.zeros(4), torch.stack(grads)).backward()
            optimizer.step()
        ratios.append(float(toy.cost(asked.gates(asked.harden()))) / toy.optimum())
    assert sum(ratios) / 3 < 1.10
