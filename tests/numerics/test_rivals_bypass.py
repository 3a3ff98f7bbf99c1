"""Laws of the policy gradient: expectation by enumeration, projection, and no gradient through the model."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from src.data.arithmetic import build_tokenizer, problems
from src.policies import BypassBP
from src.policies.bypass import project
from src.search import MaskSearch
from tests.numerics.test_rivals_gates import additive, learn

S = torch.tensor([0.2, 0.5, 0.7, 0.9])
MASKS = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)))
LOSSES = torch.rand(16, generator=torch.Generator().manual_seed(0))


def bypass(baseline: float, **keys: object) -> BypassBP:
    asked = BypassBP(init="uniform", **keys)
    asked.setup(4, 2)
    with torch.no_grad():
        asked.logits.copy_(S)
        asked.baseline.fill_(baseline)
    return asked


def true_gradient() -> Tensor:
    s = S.clone().requires_grad_()
    expected = ((MASKS * s + (1 - MASKS) * (1 - s)).prod(1) * LOSSES).sum()
    return torch.autograd.grad(expected, s)[0]


def expected_estimate(draws: int, **keys: object) -> Tensor:
    """The estimate's expectation by enumerating every tuple of draws."""
    p = (MASKS * S + (1 - MASKS) * (1 - S)).prod(1)
    total = torch.zeros(4)
    for rows in itertools.product(range(16), repeat=draws):
        asked, chosen = bypass(0.3, **keys), list(rows)
        told = asked.surrogate(MASKS[chosen], LOSSES[chosen], None)
        total += p[chosen].prod() * torch.autograd.grad(told, asked.logits)[0]
    return total


@pytest.mark.parametrize("draws", [1, 2])
def test_the_exact_score_is_an_unbiased_gradient(draws: int) -> None:
    torch.testing.assert_close(
        expected_estimate(draws, exact_score=True), true_gradient(), rtol=1e-4, atol=1e-5
    )


def test_the_papers_score_is_the_gradient_times_the_standard_deviation() -> None:
    """And times (J - 1/w) / (J - 1), for the baseline holds 1/w of the draws it is subtracted from."""
    scale = (S * (1 - S)).sqrt() * (2 - 1 / 5) / (2 - 1)
    torch.testing.assert_close(expected_estimate(2), true_gradient() * scale, rtol=1e-4, atol=1e-5)


def test_a_loss_that_is_not_finite_goes_with_its_mask() -> None:
    one, other = bypass(0.3), bypass(0.3)
    losses = torch.tensor([float("nan"), 0.2, float("inf"), 0.6])
    a = torch.autograd.grad(one.surrogate(MASKS[[1, 4, 7, 9]], losses, None), one.logits)[0]
    b = torch.autograd.grad(other.surrogate(MASKS[[4, 9]], losses[[1, 3]], None), other.logits)[0]
    assert torch.equal(a, b)
    assert torch.equal(one.baseline, other.baseline)
    before = one.baseline.clone()
    assert one.surrogate(MASKS[:1], losses[:1], None) == 0
    assert torch.equal(one.baseline, before)


def test_the_projection_is_the_nearest_point_of_the_budget() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        value = 3 * torch.rand(12, generator=generator) - 0.5
        found = project(value, 4)
        assert abs(float(found.double().sum()) - 4) < 1e-6
        assert torch.equal(project(found, 4), found)
        other = torch.rand(12, generator=generator)
        other = other * min(1.0, 4 / float(other.sum()))
        assert (found - value).norm() <= (other - value).norm()
    inside = torch.rand(12, generator=generator) / 4
    assert torch.equal(project(inside, 4), inside)


@pytest.mark.slow
def test_policy_gradient_finds_the_best_layers_of_a_toy() -> None:
    value, cost = additive(12)
    asked = BypassBP(init="uniform", always_keep=[int(value.argmin())])
    asked.setup(12, 4)
    learn(asked, cost, torch.optim.SGD(asked.parameters(), lr=0.01), range(600), draws=8)
    assert set(range(12)) - set(asked.harden()) == set(value.argsort()[1:5].tolist())
    keep = asked.keep_probabilities()
    assert keep.sum() <= 8 + 1e-5
    assert keep[int(value.argmin())] == 1


def test_forward_passes_only(teacher_dir: str) -> None:
    """No graph on the model: layers run without autograd, and nothing of their size is saved."""
    tokenizer = build_tokenizer()
    rows = tokenizer([r["question"] for r in problems("train", 2, 0)], return_tensors="pt", padding=True)
    batch = {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"]}
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    made = MaskSearch(teacher_dir, BypassBP(init="uniform"), remove=2, draws=3)
    made.configure_model()
    made._trainer = SimpleNamespace(accumulate_grad_batches=1, global_step=0, world_size=1)  # type: ignore[assignment]
    made.log = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    layers, saved = list[bool](), list[int]()
    for layer in made.gates.layers:
        layer.register_forward_hook(lambda *_: layers.append(torch.is_grad_enabled()))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        made.training_step(batch, 0).backward()
    assert len(layers) > 6
    assert not any(layers)
    assert max(saved) <= 6  # one number for each of six layers
    assert made.policy.logits.grad is not None
    masks = torch.stack([made.policy.sample(0, d) for d in range(3)])
    tokens = int(batch["attention_mask"].sum())
    assert made.forward_tokens == pytest.approx(tokens * (1 + float(masks.sum()) / 6))
