"""Gradients reach the gates through quantised weights: they are those of the very weights, unpacked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from src.data.batches import supervised
from src.losses.distill import Distillation
from src.losses.signals import live_signal
from src.models.gated import GatedLayers, freeze
from src.models.head import OutputHead
from src.models.loading import Quantization, load_model


@pytest.fixture(params=[96, 128])
def folder(request: Any, tmp_path: Path) -> str:
    """Rows of whole and of broken blocks of 64 weights, which nf4 scales together."""
    width = request.param
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=128, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    return str(tmp_path)


def gate_gradient(model: PreTrainedModel) -> Tensor:
    """Gradient of a search's loss at a mask that removes one layer, after a pass of the teacher."""
    ids = torch.randint(3, 128, (4, 20), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    index, leaf = supervised(ids), torch.tensor([1.0, 0.0, 1.0, 1.0], requires_grad=True)
    gates, head = GatedLayers(freeze(model)), OutputHead(model)
    with torch.no_grad():
        signal = live_signal(head, head.hidden(batch).flatten(0, 1)[index], 10)
    with gates.use(leaf):
        hidden_NH = head.hidden(batch).flatten(0, 1)[index]
    loss = Distillation(weight="none")(head, hidden_NH, ids.flatten()[index + 1], signal)["loss"]
    return torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize(("quantize", "tolerance"), [("int8", 0.03), ("nf4", 1e-4)])
def test_gates_learn_through_quantised_weights(folder: str, quantize: Quantization, tolerance: float) -> None:
    """int8 rounds the activations as well; nf4 rounds nothing but the weights."""
    packed, plain = load_model(folder, quantize=quantize), load_model(folder)
    for one, other in zip(packed.modules(), plain.modules(), strict=True):
        held: Any = one
        if isinstance(one, bnb.nn.Linear4bit):
            other.weight.data = bnb.functional.dequantize_4bit(held.weight.data, held.weight.quant_state)
        elif isinstance(one, bnb.nn.Linear8bitLt):
            other.weight.data = held.weight.CB.float() * held.weight.SCB[:, None] / 127
    found, wanted = gate_gradient(packed), gate_gradient(plain)
    assert float((found - wanted).norm() / wanted.norm()) < tolerance
