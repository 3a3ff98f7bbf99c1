"""Sums over held-out rows: each row's own, however rows are ordered, batched, padded and computed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig

from src.errors import ConfigError
from src.evaluate.text import LARGEST_LOSS, ROW_SUMS, held_out, row_sums
from tests.tiny import VOCAB, tiny_ids, tiny_model

Batch = dict[str, Tensor]


def batch(rows: int = 5, tokens: int = 11, seed: int = 0, prompt: int = 3) -> Batch:
    ids = tiny_ids(rows, tokens, seed)
    labels = ids.clone()
    labels[:, :prompt] = -100
    labels[1, :] = -100  # a row with nothing to judge
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def part(whole: Batch, index: Any) -> Batch:
    return {key: value[index] for key, value in whole.items()}


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    return tiny_model("llama", 0), tiny_model("llama", 1)


def column(sums_RC: Tensor, name: str) -> Tensor:
    return sums_RC[:, ROW_SUMS.index(name)]


def test_they_are_the_plain_formulas_row_by_row(pair: tuple[Any, Any]) -> None:
    student, teacher = pair
    whole = batch()
    found = row_sums(student, teacher, [whole], chunk=4)
    with torch.no_grad():
        own, other = (m(whole["input_ids"]).logits.double().log_softmax(-1)[:, :-1] for m in pair)
    labels = whole["labels"][:, 1:]
    for row in range(5):
        at = labels[row] != -100
        q, p, target = own[row][at], other[row][at], labels[row][at]
        expected = [
            -q.gather(1, target[:, None]).sum(), -p.gather(1, target[:, None]).sum(),
            (p.exp() * (p - q)).sum(), (p.argmax(-1) == q.argmax(-1)).sum(), at.sum(),
        ]  # fmt: skip
        torch.testing.assert_close(
            found[row], torch.stack([x.double() for x in expected]), rtol=1e-4, atol=1e-5
        )
    assert found[1].tolist() == [0.0] * 5


def test_order_batches_chunks_and_padding_change_no_row(pair: tuple[Any, Any]) -> None:
    whole = batch()
    plain = row_sums(*pair, [whole])
    order = torch.tensor([3, 1, 4, 0, 2])
    close(row_sums(*pair, [part(whole, order)]), plain[order])
    close(row_sums(*pair, [part(whole, slice(0, 2)), part(whole, slice(2, 5))]), plain)
    close(row_sums(*pair, [whole], chunk=1), plain)
    fill = {"input_ids": 7, "attention_mask": 0, "labels": -100}
    close(row_sums(*pair, [{k: F.pad(v, (0, 6), value=fill[k]) for k, v in whole.items()}]), plain)
    assert row_sums(*pair, []).shape == (0, len(ROW_SUMS))


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_model_beside_itself_is_no_way_off_and_divergence_is_never_negative(pair: tuple[Any, Any]) -> None:
    student, teacher = pair
    same = row_sums(student, student, [batch()])
    assert column(same, "kl").abs().max() < 1e-5
    assert torch.equal(column(same, "agreement"), column(same, "tokens"))
    assert torch.equal(column(same, "loss"), column(same, "teacher_loss"))
    there, back = row_sums(student, teacher, [batch()]), row_sums(teacher, student, [batch()])
    assert (column(there, "kl") >= 0).all()
    assert torch.equal(column(there, "loss"), column(back, "teacher_loss"))
    assert torch.equal(column(there, "agreement"), column(back, "agreement"))
    assert not torch.allclose(column(there, "kl"), column(back, "kl"))


def test_without_a_teacher_the_loss_is_the_same_and_nothing_is_compared(pair: tuple[Any, Any]) -> None:
    student, teacher = pair
    beside, alone = held_out(student, teacher, [batch()]), held_out(student, None, [batch()])
    assert alone == {key: beside[key] for key in ("loss", "perplexity", "tokens")}
    assert beside["kl_interval"][0] < beside["kl"] < beside["kl_interval"][1]


class Said(SimpleNamespace):
    """A model that says given logits, whatever it reads."""

    device, name_or_path = torch.device("cpu"), "said"
    config = LlamaConfig(vocab_size=VOCAB)

    def __call__(self, **_: Any) -> Any:
        return SimpleNamespace(logits=self.logits)


def said(width: int = VOCAB, seed: int = 0, **odd: float) -> Any:
    logits = torch.randn(5, 11, VOCAB + 9, generator=torch.Generator().manual_seed(seed))[..., :width].clone()
    for token, value in odd.items():
        logits[..., int(token[1:])] = value
    return Said(logits=logits)


def test_a_constant_on_the_logits_says_nothing() -> None:
    plain, moved = said(), said()
    moved.logits = moved.logits + 50.0
    close(row_sums(moved, said(seed=1), [batch()]), row_sums(plain, said(seed=1), [batch()]))


def test_a_wider_teacher_is_judged_within_the_students_tokens() -> None:
    """Its own loss is that over all of its tokens."""
    student, wide, narrow = said(), said(VOCAB + 9, seed=1), said(VOCAB, seed=1)
    one, other = (row_sums(student, teacher, [batch()]) for teacher in (wide, narrow))
    for name in ("loss", "kl", "agreement", "tokens"):
        close(column(one, name), column(other, name))
    assert (column(one, "teacher_loss") >= column(other, "teacher_loss")).all()


def test_impossible_tokens_make_no_nan() -> None:
    never = -torch.inf
    found = row_sums(said(t0=never, t1=never), said(seed=1, t0=never, t2=never), [batch()])
    assert column(found, "kl").isfinite().all()


@pytest.mark.parametrize("size", [LARGEST_LOSS * 2, float("nan"), float("inf")])
def test_a_loss_that_has_no_perplexity_is_told(size: float) -> None:
    broken = said()
    broken.logits = size * torch.ones_like(broken.logits).cumsum(-1)
    with pytest.raises(ConfigError, match=r"--model: 'said' has a loss of .* try --dtype float32"):
        held_out(broken, said(seed=1), [batch()])


def test_nothing_to_judge_is_told() -> None:
    whole = batch(prompt=11)
    with pytest.raises(ConfigError, match="--data: no row has a supervised token"):
        held_out(said(), said(seed=1), [whole])
