"""Laws of the split by entropy: which tokens are reversed, what that is, its zero and its gradient."""

from __future__ import annotations

import math

import pytest
import torch

from src.losses.distill import Distillation
from src.losses.kl import kl
from src.losses.signals import Signal, dense_signal, topk_signal
from src.models.head import OutputHead
from tests.numerics.test_losses import RULES, graded, logits, step
from tests.tiny import VOCAB, tiny_model

ALL = math.inf
"""A threshold above any entropy."""


def signals(teacher: torch.Tensor, k: int = 5) -> dict[str, Signal]:
    return {"dense": dense_signal(teacher), "top-k": topk_signal(teacher, k)}


def spread(seed: int) -> torch.Tensor:
    """Logits of teachers from sure to uncertain."""
    return logits(seed, tokens=6) * torch.tensor([4.0, 2.0, 1.0, 0.5, 0.1, 8.0])[:, None]


@pytest.mark.parametrize("form", ["dense", "top-k"])
def test_each_token_is_forward_or_reverse_by_the_teachers_entropy(form: str) -> None:
    signal, student = signals(spread(1))[form], logits(0)
    threshold = float(signal.entropy.median()) + 1e-4
    sure = signal.entropy < threshold
    mixed, forward = kl(student, signal, reverse_below=threshold), kl(student, signal)
    reverse = kl(student, signal, reverse_below=ALL)
    assert 0 < sure.sum() < len(sure)
    assert torch.equal(mixed, torch.where(sure, reverse, forward))
    assert torch.equal(kl(student, signal, reverse_below=0.0), forward)
    assert (reverse - forward).abs().min() > 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_reverse_is_the_rule_with_the_two_exchanged_in_value_and_gradient(rule: str) -> None:
    """Written as probabilities and left to autograd, in float64."""
    teacher, ours, theirs, weights = logits(1), graded(logits(0)), graded(logits(0)), torch.rand(6)
    signal = topk_signal(teacher, 5)
    value = kl(ours, signal, rule, reverse_below=ALL)
    p, q = teacher.double().softmax(-1).gather(-1, signal.ids), theirs.double().softmax(-1)
    q = q.gather(-1, signal.ids)
    r, s = 1 - p.sum(-1), 1 - q.sum(-1)
    if rule != "bucket":
        q = q / q.sum(-1, keepdim=True)
        p = p / p.sum(-1, keepdim=True) if rule == "renormalise" else p
    expected = (q * (q / p).log()).sum(-1) + (s * (s / r).log() if rule == "bucket" else 0)
    (value @ weights).backward()
    (expected @ weights.double()).backward()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("threshold", [0.7, ALL])
def test_the_whole_vocabulary_is_the_dense_divergence(threshold: float) -> None:
    teacher, ours, theirs = spread(1), graded(logits(0)), graded(logits(0))
    value = kl(ours, topk_signal(teacher, 23), reverse_below=threshold)
    expected = kl(theirs, dense_signal(teacher), reverse_below=threshold)
    value.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threshold", [0.7, ALL])
@pytest.mark.parametrize("form", ["dense", "top-k"])
def test_no_loss_and_no_gradient_at_student_equals_teacher(form: str, threshold: float) -> None:
    student = graded(spread(0))
    value = kl(student, signals(spread(0))[form], reverse_below=threshold)
    value.sum().backward()
    assert value.abs().max() < 1e-6
    assert student.grad.abs().max() < 1e-6


@pytest.mark.parametrize("form", ["dense", "top-k"])
def test_impossible_tokens_give_finite_losses_and_gradients(form: str) -> None:
    teacher, student = logits(1), logits(0)
    teacher[:, 4:], student[:, 9:] = -torch.inf, -torch.inf
    student.requires_grad_()
    value = kl(student, signals(teacher, 7)[form], reverse_below=ALL)
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad.isfinite().all()


def test_chunks_and_weights_change_nothing() -> None:
    head, hidden, labels = OutputHead(tiny_model("llama")), torch.randn(9, 32), torch.arange(9)
    signal = topk_signal(2 * logits(3, 9, VOCAB), 10)
    split = float(signal.entropy.median())
    one, other = (
        step(Distillation(reverse_below=split, chunk_tokens=size), head, hidden, labels, signal)
        for size in (2, 256)
    )
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    plain = step(Distillation(), head, hidden, labels, signal)
    assert not torch.allclose(one[0], plain[0], rtol=1e-3)
