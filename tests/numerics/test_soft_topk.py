"""Laws of SoftTopK: the sum, the optimum that defines it, and its gradient, three ways."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from src.policies.soft_topk import soft_topk


def scores(*shape: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [5.0, 1.0, 0.01])
@pytest.mark.parametrize("k", [1, 25, 99])
def test_each_choice_sums_to_exactly_k(k: int, temperature: float) -> None:
    soft = soft_topk(scores(3, 100), k, temperature)
    torch.testing.assert_close(
        soft.sum(-1), torch.full((3,), float(k), dtype=torch.float64), rtol=0, atol=1e-12
    )
    assert ((soft >= 0) & (soft <= 1)).all()
    torch.testing.assert_close(soft_topk(scores(3, 100).float(), k).sum(-1), torch.full((3,), float(k)))


def test_by_hand() -> None:
    """Two units share 1 by the difference of their scores; scores that are odds of shares give the shares."""
    z = torch.tensor([0.7, -0.7], dtype=torch.float64)
    torch.testing.assert_close(soft_topk(z, 1), torch.sigmoid(z))
    shares = torch.tensor([0.9, 0.6, 0.3, 0.2], dtype=torch.float64)
    torch.testing.assert_close(soft_topk(shares.logit() + 41.0, 2), shares)
    torch.testing.assert_close(soft_topk(torch.zeros(8), 2), torch.full((8,), 0.25))


def test_a_shift_changes_nothing_and_order_is_kept() -> None:
    z = scores(40)
    soft = soft_topk(z, 12)
    torch.testing.assert_close(soft_topk(z + 1e3, 12), soft, rtol=0, atol=1e-9)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(soft_topk(z[order], 12), soft[order])
    assert torch.equal(soft.argsort(), z.argsort())


def test_it_is_the_optimum_of_scores_and_entropy() -> None:
    """No other point of ``sum s = k`` has a higher ``z . s + H(s)``."""
    z, k = scores(12), 5
    best = soft_topk(z, k)

    def value(s: Tensor) -> Tensor:
        return (z * s + torch.special.entr(s) + torch.special.entr(1 - s)).sum(-1)

    for seed in range(200):
        aside = scores(12, seed=seed + 1, spread=1.0)
        other = best + 1e-3 * best.mul(1 - best).min() * (aside - aside.mean())
        assert torch.isclose(other.sum(), best.sum())
        assert value(other) < value(best)
    assert all(value(soft_topk(scores(12, seed=seed), k)) < value(best) for seed in range(1, 50))


def test_the_gradient_is_that_of_finite_differences_and_of_the_implicit_function() -> None:
    z, k = scores(9, spread=1.5), 4
    jacobian = torch.autograd.functional.jacobian(lambda x: soft_topk(x, k), z)
    soft = soft_topk(z, k)
    v = soft * (1 - soft)
    torch.testing.assert_close(jacobian, torch.diag(v) - torch.outer(v, v) / v.sum(), rtol=0, atol=1e-12)
    step = 1e-5 * torch.eye(9, dtype=torch.float64)
    differences = torch.stack([(soft_topk(z + e, k) - soft_topk(z - e, k)) / 2e-5 for e in step], 1)
    torch.testing.assert_close(jacobian, differences, rtol=0, atol=1e-9)
    assert torch.autograd.gradcheck(lambda x: soft_topk(x, k, 0.7), scores(2, 6).requires_grad_())


def test_what_shifts_all_scores_has_no_gradient() -> None:
    z = scores(3, 20).requires_grad_()
    (grad,) = torch.autograd.grad((soft_topk(z, 7) * scores(3, 20, seed=2)).sum(), z)
    torch.testing.assert_close(grad.sum(-1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    assert grad.abs().max() > 1e-3


def test_cold_or_far_apart_it_is_the_hard_choice_and_stays_finite() -> None:
    z = scores(2, 30, spread=1e4).requires_grad_()
    soft = soft_topk(z, 10, 0.01)
    hard = torch.zeros_like(z).scatter(-1, z.topk(10).indices, 1.0)
    torch.testing.assert_close(soft, hard, rtol=0, atol=1e-6)
    (grad,) = torch.autograd.grad(soft.square().sum(), z)
    assert grad.isfinite().all()


@pytest.mark.parametrize(("k", "value"), [(0, 0.0), (5, 1.0)])
def test_where_nothing_is_left_to_choose_there_is_no_gradient(k: int, value: float) -> None:
    z = scores(2, 5).requires_grad_()
    soft = soft_topk(z, k)
    assert (soft == value).all()
    (grad,) = torch.autograd.grad(soft.sum(), z)
    assert (grad == 0).all()
