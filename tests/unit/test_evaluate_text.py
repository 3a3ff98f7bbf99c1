"""Judging held-out text: means over supervised tokens, in batches and parts of any size."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from src.data.documents import Columns
from src.data.judging import batches, by_length, judged
from src.errors import ConfigError
from src.evaluate.text import held_out, of_teacher, row_sums

QA = Columns(prompt="question", answer="answer")


def test_held_out_is_the_mean_over_supervised_tokens(models, tokenizer, rows) -> None:
    student, teacher = models
    encoded = judged(tokenizer, rows, QA).rows
    kl, agree, loss, tokens = 0.0, 0, 0.0, 0
    for row in rows:  # one at a time, in the plainest way
        head, tail = tokenizer([row["question"] + "\n", row["answer"] + "<eos>"]).input_ids
        ids = torch.tensor([head + tail])
        with torch.no_grad():
            p, q = (m(ids).logits[0, len(head) - 1 : -1].double().softmax(-1) for m in (teacher, student))
        kl += float((p * (p / q).log()).sum())
        agree += int((p.argmax(-1) == q.argmax(-1)).sum())
        loss -= float(q[torch.arange(len(tail)), tail].log().sum())
        tokens += len(tail)
    for size, chunk in ((1, 1024), (5, 7)):
        figures = held_out(student, teacher, batches(encoded, size, 0), chunk)
        assert figures["tokens"] == tokens
        assert figures["agreement"] == agree / tokens
        assert figures["kl"] == pytest.approx(kl / tokens, rel=1e-5)
        assert figures["loss"] == pytest.approx(loss / tokens, rel=1e-5)
        assert figures["perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-4)


def test_a_model_judged_beside_itself_is_perfect(models, tokenizer, rows) -> None:
    teacher = models[1]
    text = batches(judged(tokenizer, rows, QA, "all").rows, 4, 0)
    figures = held_out(teacher, teacher, text)
    assert (figures["kl"], figures["agreement"]) == (0.0, 1.0)
    assert figures["loss"] == figures["teacher_loss"]


def test_a_teacher_judged_beside_a_model_is_as_judged_alone(models, tokenizer, rows) -> None:
    text = list(batches(judged(tokenizer, rows, QA, "all").rows, 4, 0))
    beside = row_sums(*models, text)
    alone = row_sums(models[1], None, text)
    assert torch.equal(of_teacher(beside), alone)
    assert not torch.equal(beside, alone)


def test_rows_whose_logits_have_no_room_are_judged_in_parts(
    models, tokenizer, rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = models
    seen = list[int]()
    for model in models:
        monkeypatch.setattr(model, "forward", recorded(model.forward, seen))
    encoded = judged(tokenizer, rows, QA).rows
    whole = row_sums(student, teacher, batches(encoded, len(encoded), 0))
    room = max(seen) // 3
    monkeypatch.setattr("src.evaluate.text.HELD", 4 * room)
    seen.clear()
    torch.testing.assert_close(row_sums(student, teacher, batches(encoded, len(encoded), 0)), whole)
    assert max(seen) <= room
    monkeypatch.setattr("src.evaluate.text.HELD", 1)
    torch.testing.assert_close(row_sums(student, teacher, batches(encoded, len(encoded), 0)), whole)


def recorded(forward: Any, seen: list[int]) -> Any:
    """Return the forward pass, which notes how many logits it gives."""

    def run(**inputs: Any) -> Any:
        out = forward(**inputs)
        seen.append(out.logits.numel())
        return out

    return run


def test_batches_come_by_length(tokenizer, rows) -> None:
    encoded = judged(tokenizer, rows, QA, "all").rows
    encoded += [replace(row, ids=row.ids[::-1]) for row in encoded]  # as long, and another
    read = list[list[int]]()
    for batch in batches(encoded, 5, 0):
        lengths = batch["attention_mask"].sum(-1).tolist()
        read += [row[:n] for row, n in zip(batch["input_ids"].tolist(), lengths, strict=True)]
    assert read == [encoded[place].ids for place in by_length(encoded)]


def test_rows_without_supervised_tokens_are_refused(models, tokenizer, rows) -> None:
    text = batches(judged(tokenizer, rows, QA, max_length=3).rows, 4, 0)
    with pytest.raises(ConfigError, match="max-length"):
        held_out(models[0], None, text)


# ---------------------------------------------------------------------- the task


def test_figures_have_intervals_that_hold_them(models, tokenizer, rows) -> None:
    teacher, student = models[:2]
    judgement = held_out(student, teacher, batches(judged(tokenizer, rows, QA, "all").rows, 4, 0))
    low, high = judgement["kl_interval"]
    assert low <= judgement["kl"] <= high
    assert low < high
    same = held_out(teacher, teacher, batches(judged(tokenizer, rows, QA, "all").rows, 4, 0))
    assert same["kl_interval"] == pytest.approx([0.0, 0.0], abs=1e-6)
    assert "kl_interval" not in held_out(student, None, batches(judged(tokenizer, rows, QA).rows, 4, 0))
