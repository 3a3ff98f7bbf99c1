"""Laws of the tail: the chain rule, both ends of its weight, gradients, zero, and who can give it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from src.data.batches import Batch, Supervised
from src.errors import ConfigError
from src.losses.distill import Distillation
from src.losses.kl import kl, tailed_kl
from src.losses.signals import dense_signal, topk_signal
from src.models.head import OutputHead
from tests.numerics.test_losses import graded, logits, plain_kl, plain_topk, step
from tests.numerics.test_terms import graded as graded_recovery
from tests.numerics.test_terms import recovery, rows  # noqa: F401
from tests.tiny import VOCAB, tiny_model

K = 5


def within_tail(q: Tensor, p: Tensor, k: int = K) -> tuple[Tensor, Tensor]:
    """Mass of the tail of ``p`` and the divergence within it, from probabilities, in float64."""
    p, q = p.double().softmax(-1), q.double().softmax(-1)
    rest = p.argsort(-1, descending=True)[:, k:]
    p, q = p.gather(-1, rest), q.gather(-1, rest)
    r, s = p.sum(-1, keepdim=True), q.sum(-1, keepdim=True)
    return r[:, 0], (p / r * (p / r / (q / s)).log()).sum(-1)


def test_the_full_divergence_is_that_of_the_classes_and_the_tails_by_its_mass() -> None:
    """The chain rule, exact in float64; it is what the weight of the tail rests on."""
    ours, theirs = logits(0).double(), logits(1).double()
    mass, inside = within_tail(ours, theirs)
    whole = plain_topk(ours, theirs, K, "bucket") + mass * inside
    torch.testing.assert_close(whole, plain_kl(ours, theirs), rtol=1e-13, atol=1e-15)
    assert (mass * inside).min() > 1e-3


@pytest.mark.parametrize("tail", [0.0, 0.3, 1.0, 4.0])
def test_it_is_its_formula_in_value_and_gradient(tail: float) -> None:
    """Left to autograd in float64; at 0 it is the rule ``bucket``, at 1 the full divergence."""
    ours, theirs, weights = graded(logits(0)), graded(logits(0)), torch.rand(6)
    value = tailed_kl(ours, dense_signal(logits(1)), K, tail)
    mass, inside = within_tail(theirs, logits(1))
    expected = plain_topk(theirs, logits(1), K, "bucket") + tail * mass * inside
    (value @ weights).backward()
    (expected @ weights.double()).backward()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)
    ends = {0.0: kl(ours, topk_signal(logits(1), K)), 1.0: kl(ours, dense_signal(logits(1)))}
    if tail in ends:
        torch.testing.assert_close(value, ends[tail], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_at_a_temperature_nothing_is_extrapolated(temperature: float) -> None:
    ours, theirs = logits(0), logits(1)
    cold = tailed_kl(ours, dense_signal(theirs), K, 0.7, temperature)
    torch.testing.assert_close(
        cold, tailed_kl(ours / temperature, dense_signal(theirs / temperature), K, 0.7), rtol=1e-5, atol=1e-6
    )


def test_reversed_tokens_have_the_reverse_of_both_summands() -> None:
    """Where the two are exchanged, the tail's mass is the student's; the teacher's choice of tokens stays."""
    ours, signal = logits(0), dense_signal(logits(1))
    ends = [kl(ours, each, reverse_below=math.inf) for each in (signal.truncate(K), signal)]
    found = tailed_kl(ours, signal, K, 0.3, reverse_below=math.inf)
    torch.testing.assert_close(found, 0.7 * ends[0] + 0.3 * ends[1], rtol=1e-5, atol=1e-6)
    assert ((found - tailed_kl(ours, signal, K, 0.3)).abs() > 1e-3).all()


def test_no_loss_and_no_gradient_at_student_equals_teacher() -> None:
    student = graded(logits(0))
    value = tailed_kl(student, dense_signal(logits(0)), K, 50.0)
    value.sum().backward()
    assert value.abs().max() < 1e-5
    assert student.grad.abs().max() < 1e-5


def test_impossible_tokens_give_finite_losses_and_gradients() -> None:
    teacher, student = logits(1), logits(0)
    teacher[:, 4:], student[:, 9:] = -torch.inf, -torch.inf
    student.requires_grad_()
    value = tailed_kl(student, dense_signal(teacher), K, 2.0)
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad.isfinite().all()


def test_chunks_change_nothing_and_the_weight_does() -> None:
    head, hidden, labels = OutputHead(tiny_model("llama")), torch.randn(9, 32), torch.arange(9)
    signal = dense_signal(2 * logits(3, 9, VOCAB))
    one, other = (
        step(Distillation(tail=2.0, chunk_tokens=size), head, hidden, labels, signal) for size in (2, 256)
    )
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    full = step(Distillation(tail=1.0), head, hidden, labels, signal)
    for a, b in zip(full, step(Distillation(k=None), head, hidden, labels, signal), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(one[0], full[0], rtol=1e-3)


def test_a_live_teacher_gives_the_whole_distribution_and_validation_stays_what_it_was(
    mask_file: str,
    rows: Batch,  # noqa: F811
) -> None:
    """In a recovery, weight 1 is the full divergence; ``val/kl`` is that of the k tokens, whatever trains."""
    with_tail = recovery(mask_file, distillation=Distillation(k=3, tail=1.0))
    full = recovery(mask_file, distillation=Distillation(k=None))
    (value, grads), (expected, theirs) = graded_recovery(with_tail, rows), graded_recovery(full, rows)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, theirs[name], rtol=1e-4, atol=1e-6)
    plain = recovery(mask_file, distillation=Distillation(k=3))
    judged = [each.distillation.measured(each.step(Supervised.of(rows))) for each in (with_tail, plain)]
    torch.testing.assert_close(*judged, rtol=1e-5, atol=1e-6)
    assert judged[0] < value


def test_what_has_no_tail_is_refused(mask_file: str, rows: Batch) -> None:  # noqa: F811
    for keys in ({"k": None}, {"rule": "renormalise"}):
        with pytest.raises(ConfigError, match="tail: 2 given"):
            Distillation(tail=2.0, **keys)  # type: ignore[arg-type]
    made = recovery(mask_file, distillation=Distillation(tail=1.0))
    short = replace(made.step(Supervised.of(rows)), signal=topk_signal(logits(0), K))
    with pytest.raises(ConfigError, match=r"src\.teachers\.LiveTeacher"):
        made.objective(short)
