"""The laws of a teacher's signal in a student's wider or narrower vocabulary."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from src.losses.kl import RULES, kl
from src.losses.signals import Dense, TopK, dense_signal, live_signal, topk_signal
from src.models.vocabulary import within

V, WIDE, K = 20, 29, 6


def logits(width: int, beyond: float | None = None, seed: int = 0) -> Tensor:
    """Logits ``[7, width]``; those beyond V are ``beyond``, if it is given."""
    x = 3 * torch.randn(7, WIDE, generator=torch.Generator().manual_seed(seed))[:, :width]
    if beyond is not None:
        x[:, V:] = beyond
    return x


def says(x: Tensor, k: int | None, vocabulary: int | None = None) -> TopK | Dense:
    """What a live teacher says whose head gives these logits."""
    head: Any = SimpleNamespace(logits=lambda h: h.clone())
    return live_signal(head, x, k, chunk=3, vocabulary=vocabulary)


def equal(a: TopK | Dense, b: TopK | Dense) -> bool:
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


@pytest.mark.parametrize("k", [None, 1, K, V])
def test_padding_that_is_impossible_changes_nothing(k: int | None) -> None:
    padded = logits(WIDE, -math.inf)
    assert equal(says(padded, k, V), says(logits(V), k))
    assert equal(says(padded, k, WIDE), says(padded, k))


@pytest.mark.parametrize("k", [None, 1, K, V])
@pytest.mark.parametrize("beyond", [None, 0.0, 50.0])
def test_a_wider_teacher_is_its_slice(k: int | None, beyond: float | None) -> None:
    wide = logits(WIDE, beyond)
    assert equal(says(wide, k, V), says(wide[:, :V], k))


@pytest.mark.parametrize("k", [None, 1, K, V, WIDE])
def test_a_narrower_teacher_gives_no_mass_to_what_it_lacks(k: int | None) -> None:
    found = says(logits(V), k, WIDE)
    if isinstance(found, Dense):
        assert found.log_probs.shape[-1] == WIDE
        assert (found.log_probs[:, V:].exp() == 0).all()
        assert torch.equal(found.log_probs[:, :V], dense_signal(logits(V)).log_probs)
    else:
        assert (found.log_probs[found.ids >= V].exp() == 0).all()
        assert torch.allclose(found.entropy, dense_signal(logits(V)).entropy, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("k", [None, K])
def test_losses_of_students_narrower_and_wider_are_finite_and_their_gradients_too(
    rule: Any, k: int | None
) -> None:
    for teacher, student in ((WIDE, V), (V, WIDE)):
        x = logits(student, seed=1).requires_grad_()
        loss = kl(x, says(logits(teacher), k, student), rule).sum()
        loss.backward()
        assert loss.isfinite()
        assert x.grad is not None
        assert x.grad.isfinite().all()


def test_a_cached_signal_without_ids_beyond_is_as_it_was() -> None:
    stored = topk_signal(logits(WIDE, -math.inf), K)
    assert stored.within(V) is stored


@pytest.mark.parametrize("beyond", [None, 2.0])
def test_a_cached_signal_of_the_whole_vocabulary_is_its_slice(beyond: float | None) -> None:
    wide = logits(WIDE, beyond)
    found, wanted = topk_signal(wide, WIDE).within(V), topk_signal(wide[:, :V], V)
    assert torch.equal(found.ids, wanted.ids)
    for field in ("log_probs", "entropy"):
        assert torch.allclose(getattr(found, field), getattr(wanted, field), atol=1e-5), field


def test_a_cached_signal_keeps_the_likeliest_ids_that_the_student_has() -> None:
    wide = logits(WIDE, -math.inf)
    wide[0, V], wide[0, V + 1], wide[3, V + 2] = 4.0, 3.5, 9.0  # all mass beyond is stored
    found = topk_signal(wide, K + 2).within(V)
    wanted = topk_signal(wide[:, :V], K)
    assert torch.equal(found.ids, wanted.ids)
    for a, b in zip(vars(found).values(), vars(wanted).values(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    total = torch.cat([found.log_probs, found.log_rest[:, None]], -1).logsumexp(-1)
    assert torch.allclose(total, torch.zeros(7), atol=1e-5)


def test_widening_and_narrowing_of_logits() -> None:
    x = logits(V)
    assert torch.equal(within(x, V), x)
    assert torch.equal(within(x, 5), x[:, :5])
    assert torch.equal(within(x, WIDE)[:, :V], x)
    assert (within(x, WIDE)[:, V:] == -math.inf).all()
