"""Signals of a teacher: what is kept of a distribution, in whichever order it is cut, chosen and narrowed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from src.losses.signals import FLOOR, Dense, TopK, dense_signal, topk_signal

N, V = 7, 19


def logits(seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(N, V, generator=torch.Generator().manual_seed(seed))


def close(one: TopK, other: TopK, atol: float = 1e-5) -> None:
    assert torch.equal(one.ids, other.ids)
    for name in ("log_probs", "entropy"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=atol)
    torch.testing.assert_close(one.log_rest.exp(), other.log_rest.exp(), rtol=0, atol=atol)


def mass(signal: TopK) -> Tensor:
    """All of it: of the tokens, and of the rest."""
    return torch.cat([signal.log_probs, signal.log_rest[..., None]], -1).logsumexp(-1)


@pytest.mark.parametrize("k", [1, 4, V - 1, V, V + 5])
def test_the_likeliest_tokens_with_their_exact_chances_and_the_whole_entropy(k: int) -> None:
    x = logits().double()
    p = x.softmax(-1)
    signal, order = topk_signal(x.float(), k), p.sort(-1, descending=True)
    assert signal.ids.tolist() == order.indices[:, :k].tolist()
    torch.testing.assert_close(signal.log_probs.exp().double(), order.values[:, :k], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        signal.log_rest.exp().double(), order.values[:, k:].sum(-1), rtol=1e-5, atol=1e-7
    )
    torch.testing.assert_close(signal.entropy.double(), -(p * p.log()).sum(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mass(signal), torch.zeros(N), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shift", [-300.0, 0.0, 5000.0])
def test_a_constant_on_all_logits_says_nothing(shift: float) -> None:
    close(topk_signal(logits() + shift, 5), topk_signal(logits(), 5), atol=2e-3 if shift > 1000 else 1e-4)


def test_tokens_under_other_numbers_are_the_same_signal() -> None:
    order = torch.randperm(V, generator=torch.Generator().manual_seed(3))
    plain, renamed = topk_signal(logits(), 5), topk_signal(logits()[:, order], 5)
    close(TopK(order[renamed.ids], *list(vars(renamed).values())[1:]), plain)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_a_shorter_signal_is_the_shortened_one_and_shortening_twice_is_once(k: int) -> None:
    long = topk_signal(logits(), 8)
    close(long.truncate(k), topk_signal(logits(), k))
    close(long.truncate(max(k, 5)).truncate(k), long.truncate(k))
    close(long.truncate(8), long, atol=1e-6)


def test_positions_are_apart() -> None:
    """Choosing some commutes with all else, whatever the others hold."""
    index, other = torch.tensor([5, 0, 3]), logits()
    other[[1, 2, 4, 6]] = -3.0
    for x in (logits(), other):
        close(topk_signal(x, 5).select(index), topk_signal(logits()[index], 5), atol=0)
        assert torch.equal(dense_signal(x).select(index).log_probs, dense_signal(logits()[index]).log_probs)
    signal = topk_signal(logits(), 6)
    close(signal.truncate(2).select(slice(2, 5)), signal.select(slice(2, 5)).truncate(2), atol=0)


@pytest.mark.parametrize("vocabulary", [1, 6, 13, V])
def test_narrowing_twice_is_narrowing_once_and_keeps_all_mass(vocabulary: int) -> None:
    """Of the whole distribution, so that nothing beyond hides in the rest."""
    whole = topk_signal(logits(), V)
    once = whole.within(vocabulary)
    twice = whole.within(max(vocabulary, 15)).within(vocabulary)
    close(twice, once, atol=1e-4)
    close(once.within(vocabulary), once, atol=0)
    assert int(once.ids.max()) < vocabulary
    torch.testing.assert_close(once.log_probs.logsumexp(-1), torch.zeros(N), rtol=0, atol=1e-5)
    kept = logits()[:, :vocabulary].log_softmax(-1)
    torch.testing.assert_close(once.log_probs, kept.gather(-1, once.ids), rtol=0, atol=1e-5)
    torch.testing.assert_close(once.entropy, -(kept.exp() * kept).sum(-1), rtol=0, atol=1e-4)


def test_a_position_that_loses_all_of_its_tokens_keeps_the_rest() -> None:
    x = logits()
    x[2, -3:] += 40.0
    found = topk_signal(x, 3).within(V - 3)
    assert found.ids.shape[-1] == 0
    torch.testing.assert_close(found.log_rest, torch.zeros(N), rtol=0, atol=1e-4)
    assert (found.entropy >= 0).all()


@pytest.mark.parametrize("k", [1, 5, V])
def test_a_temperature_of_one_is_none_and_tempered_masses_sum_to_one(k: int) -> None:
    signal = topk_signal(logits(), k)
    inside, rest = signal.tempered(1.0, V)
    torch.testing.assert_close(inside, signal.log_probs, rtol=0, atol=1e-6)
    for temperature in (0.3, 1.0, 2.5, 50.0):
        inside, rest = signal.tempered(temperature, V)
        total = torch.cat([inside, rest[..., None]], -1).logsumexp(-1)
        torch.testing.assert_close(total, torch.zeros(N), rtol=0, atol=1e-5)
        assert (inside.diff(dim=-1) <= 1e-6).all(), "likeliest first at every temperature"


def test_heat_flattens_and_cold_sharpens() -> None:
    signal = topk_signal(logits(), V)
    spread = [float((signal.tempered(t, V)[0].exp().square()).sum()) for t in (0.1, 0.5, 1.0, 2.0, 10.0, 1e4)]
    assert spread == sorted(spread, reverse=True)
    torch.testing.assert_close(signal.tempered(1e6, V)[0].exp(), torch.full((N, V), 1 / V), rtol=0, atol=1e-4)
    assert (signal.tempered(1e-2, V)[0][:, 0].exp() > 0.99).float().mean() > 0.5


def test_a_dense_signals_entropy_is_that_of_the_short_one() -> None:
    torch.testing.assert_close(dense_signal(logits()).entropy, topk_signal(logits(), 1).entropy)
    sure = torch.full((1, V), -torch.inf).index_fill(1, torch.tensor([4]), 0.0)
    assert float(Dense(dense_signal(sure).log_probs).entropy) == 0.0
    assert float(topk_signal(sure, 2).entropy) == 0.0
    assert float(topk_signal(sure, 1).log_rest) == FLOOR
    flat = dense_signal(torch.zeros(1, V))
    assert float(flat.entropy) == pytest.approx(float(torch.tensor(float(V)).log()), abs=1e-6)
