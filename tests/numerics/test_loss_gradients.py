"""How the chunks of a gradient are added up: in float32, into buffers, and handed out once."""

from __future__ import annotations

import pytest
import torch

from src.losses.distill import Distillation
from src.losses.signals import dense_signal, topk_signal
from src.models.head import OutputHead
from tests.numerics.test_losses import graded, logits, step
from tests.tiny import VOCAB, tiny_model

torch.set_num_threads(1)


@pytest.mark.parametrize("family", ["gemma2", "phi"])  # phi's head has a bias
def test_gradients_added_to_buffers_are_autograds(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    head, hidden, labels = OutputHead(tiny_model(family)), torch.randn(9, 32), torch.arange(9)
    teacher, loss = logits(3, 9, VOCAB), Distillation(weight="none", chunk_tokens=4)
    assert head.sums
    monkeypatch.setattr("src.models.summing.SLICE", 10)
    summed = step(loss, head, hidden, labels, dense_signal(teacher))
    monkeypatch.setattr(OutputHead, "sums", False)
    for a, b in zip(summed, step(loss, head, hidden, labels, dense_signal(teacher)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_chunks_of_a_bf16_heads_gradient_are_added_up_in_float32() -> None:
    head, hidden, labels = OutputHead(tiny_model("llama")), torch.randn(512, 32), torch.arange(512) % VOCAB
    signal = topk_signal(logits(3, 512, VOCAB), 10)
    exact = step(Distillation(weight="none"), head, hidden, labels, signal)[2]
    head.model.bfloat16()
    errors = [
        float((step(Distillation(weight="none", chunk_tokens=n), head, hidden.bfloat16(), labels, signal)[2]
               - exact).norm() / exact.norm())
        for n in (4, 512)
    ]  # fmt: skip
    assert errors[0] < 1.5 * errors[1], "128 chunks are no worse than one"


def test_a_second_backward_pass_is_refused_and_not_scaled_twice() -> None:
    head, hidden = OutputHead(tiny_model("llama")), graded(torch.randn(4, 32))
    loss = Distillation()(head, hidden, torch.arange(4), topk_signal(logits(1, 4, VOCAB), 5))["loss"]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="again"):
        loss.backward()
