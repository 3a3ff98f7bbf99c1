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
from src.errors import ConfigError
from src.losses.distill import Distillation
from src.losses.signals import live_signal
from src.models.costs import parameters
from src.models.gated import GatedLayers, freeze
from src.models.head import OutputHead
from src.models.loading import Quantization, load_model


def written(width: int, tmp_path: Path) -> str:
    """A tiny Llama with rows of so many weights."""
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


@pytest.mark.parametrize(
    ("quantize", "width", "tolerance"), [("int8", 96, 0.03), ("int8", 128, 0.03), ("nf4", 128, 1e-4)]
)
def test_gates_learn_through_quantised_weights(
    tmp_path: Path, quantize: Quantization, width: int, tolerance: float
) -> None:
    """int8 rounds the activations as well; nf4 rounds nothing but the weights."""
    folder = written(width, tmp_path)
    packed, plain = load_model(folder, quantize=quantize), load_model(folder)
    assert parameters(packed) == parameters(plain)
    for one, other in zip(packed.modules(), plain.modules(), strict=True):
        held: Any = one
        if isinstance(one, bnb.nn.Linear4bit):
            other.weight.data = bnb.functional.dequantize_4bit(held.weight.data, held.weight.quant_state)
        elif isinstance(one, bnb.nn.Linear8bitLt):
            other.weight.data = held.weight.CB.float() * held.weight.SCB[:, None] / 127
    found, wanted = gate_gradient(packed), gate_gradient(plain)
    assert float((found - wanted).norm() / wanted.norm()) < tolerance


@pytest.mark.parametrize("width", [96, 128])
def test_rows_that_bitsandbytes_misreads_on_a_cpu_are_refused(width: int, tmp_path: Path) -> None:
    weight_OI = torch.randn(32, width, generator=torch.Generator().manual_seed(0))
    packed, state = bnb.functional.quantize_4bit(weight_OI, blocksize=64, quant_type="nf4")
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], -1).flatten().long()
    held_OI = (state.code[codes].view(-1, 64) * state.absmax[:, None]).view_as(weight_OI)
    right = torch.equal(bnb.functional.dequantize_4bit(packed, state), held_OI)
    assert right == (width % 64 == 0), "once it reads all rows right, nothing need be refused"
    folder = written(width, tmp_path)
    if right:
        load_model(folder, quantize="nf4")
    else:
        with pytest.raises(ConfigError, match=r"rows of 96 \(model.layers.0.self_attn.q_proj of .*Use int8"):
            load_model(folder, quantize="nf4")
