"""The full divergence a few rows at a time, and in the memory of the logits: the same bits."""

from __future__ import annotations

import pytest
import torch

from src.losses import blocks
from src.losses.kl import kl
from src.losses.signals import dense_signal
from tests.numerics.test_losses import graded, logits


@pytest.mark.parametrize("tokens", [0, 1, 6, 7])
def test_the_full_divergence_of_a_few_rows_at_a_time_has_the_bits_of_all_rows_at_once(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = []
    for rows in (8, 2, 1):
        monkeypatch.setattr(blocks, "CACHED", rows * 23)
        assert next(len(x) for (x,) in blocks.blocks(logits(0, tokens))) == min(rows, tokens)
        ours = graded(logits(0, tokens))
        value = kl(ours, dense_signal(logits(1, tokens)))
        (value * torch.arange(1.0, tokens + 1)).sum().backward()
        outcomes.append(torch.cat([value.detach()[:, None], ours.grad], 1))
    assert all(torch.equal(outcome, outcomes[0]) for outcome in outcomes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_logits_that_may_be_lost_give_the_same_bits(temperature: float, dtype: torch.dtype) -> None:
    outcomes, given = [], logits(0).to(dtype)
    for overwrite in (False, True):
        leaf = graded(given)
        own = leaf * 1.0
        value = kl(own, dense_signal(logits(1)), temperature=temperature, overwrite=overwrite)
        lost = overwrite and temperature == 1 and dtype == torch.float32
        assert torch.equal(own.detach(), given) is not lost
        value.sum().backward()
        outcomes.append(torch.cat([value.detach()[:, None], leaf.grad], 1))
    assert torch.equal(*outcomes)
