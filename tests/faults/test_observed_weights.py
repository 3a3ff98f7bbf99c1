"""Equal weights are observed equal, whatever a model has been through: where the proof of an export looks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from src.export.observe import compare, observe, proof_tokens
from tests.tiny import tiny_model


def _frozen(model: PreTrainedModel) -> None:
    model.requires_grad_(False)


def _partly_frozen(model: PreTrainedModel) -> None:
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)


def _training(model: PreTrainedModel) -> None:
    model.train()


def _hooked(model: PreTrainedModel) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _m, _a, out: out * 1.5)
            module.register_forward_pre_hook(lambda _m, args: (args[0] + 1,))


def _transposed(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data.T.contiguous().T


def _unaligned(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        room = parameter.new_empty(parameter.numel() + 1)
        room[1:] = parameter.data.flatten()
        parameter.data = room[1:].view(parameter.shape)


@pytest.mark.parametrize("past", [_frozen, _partly_frozen, _training, _hooked, _transposed, _unaligned])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_equal_weights_are_observed_equal_whatever_the_model_has_been_through(family: str, past: Any) -> None:
    one, other = tiny_model(family, attention_dropout=0.1), tiny_model(family, attention_dropout=0.1)
    past(other)
    state = [(m.training, *(p.requires_grad for p in m.parameters(recurse=False))) for m in other.modules()]
    hooks = [len(m._forward_hooks) for m in other.modules()]
    ids_BT = proof_tokens(one.config)
    found = compare(observe(one, ids_BT), observe(other, ids_BT), "float32", exact=True)
    assert [f.detail for f in found if not f.passed] == []
    assert state == [
        (m.training, *(p.requires_grad for p in m.parameters(recurse=False))) for m in other.modules()
    ]
    assert hooks == [len(m._forward_hooks) for m in other.modules()]


def test_another_weight_is_observed_different() -> None:
    one, other = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        next(other.parameters())[3:, 0] += 1e-5
    ids_BT = proof_tokens(one.config)
    assert not all(f.passed for f in compare(observe(one, ids_BT), observe(other, ids_BT), "float32", True))
