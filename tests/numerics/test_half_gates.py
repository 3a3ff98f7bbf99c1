"""Gates on halves as a user of them sees them: with a cache, in half precision, watched, nested, removed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from src.export.observe import plain
from src.mask import Mask
from src.models.cut import cut
from src.models.layers import decoder_layers
from src.report import figures
from src.units.half_gates import HalfGates
from src.units.kinds import KINDS
from tests import families
from tests.tiny import LAYERS, tiny_ids, tiny_model

KEEP = (0, 1, 2, 3, 4, 7, 8, 9, 12, 13)
FAMILIES = ["llama", "gpt2", "gemma3_text", "bloom", "lfm2"]


def mask_of_halves(keep: tuple[int, ...] = KEEP) -> Mask:
    return Mask("m", LAYERS, keep, "by hand", unit="half")


def gates_of(mask: Mask) -> Tensor:
    return torch.zeros(mask.units).index_fill(0, torch.tensor(mask.keep), 1.0)


def greedy(model: PreTrainedModel, ids: Tensor, use_cache: bool) -> Tensor:
    generate: Any = model.generate
    keys = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    return generate(ids, attention_mask=torch.ones_like(ids), use_cache=use_cache, **keys)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_closed_attention_fills_its_cache_and_changes_no_token(family: str) -> None:
    """Generation under gates is that of the cut, with the cache and without it."""
    model, ids = tiny_model(family), tiny_ids()
    short = cut(model, mask_of_halves())
    expected = greedy(short, ids, use_cache=True)
    gates = HalfGates(model)
    with gates.use(gates_of(mask_of_halves())):
        assert torch.equal(greedy(model, ids, use_cache=True), expected)
        assert torch.equal(greedy(model, ids, use_cache=False), greedy(short, ids, use_cache=False))
    gates.remove()


@pytest.mark.parametrize("family", ["llama", "bloom", "gemma3_text"])
@torch.no_grad()
def test_a_closed_attention_fills_its_cache_in_a_proof_too(family: str) -> None:
    """A proof takes the hooks off all modules; the second pass knows what a resting half would return."""
    model, ids = tiny_model(family), tiny_ids()
    gates = HalfGates(model)
    with plain(model), gates.use(gates_of(mask_of_halves())):
        for _ in range(2):
            cache = model(input_ids=ids, use_cache=True).past_key_values
    gates.remove()
    assert [cache.get_seq_length(layer) for layer in range(LAYERS)] == [ids.shape[1]] * LAYERS


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rows_of_another_length_meet_the_same_gates(family: str) -> None:
    """What rests is of the shape of these rows, not of the rows before."""
    model, short = tiny_model(family), cut(tiny_model(family), mask_of_halves())
    gates = HalfGates(model)
    with gates.use(None):
        model(input_ids=tiny_ids(), use_cache=False)
    for length in (5, 9, 12):
        ids = tiny_ids()[:, :length]
        with gates.use(gates_of(mask_of_halves())):
            gated = model(input_ids=ids, use_cache=False).logits
        assert torch.equal(gated, short(input_ids=ids, use_cache=False).logits)


@pytest.mark.parametrize("family", ["hy_v4", "xlstm"])
@torch.no_grad()
def test_a_module_with_more_to_say_than_the_stream_does_not_rest(family: str) -> None:
    """One gives a factor for each of several streams, one the state that its layer keeps for each row."""
    model, ids = families.tiny_model(family), tiny_ids()
    mask = Mask("m", 7, tuple(unit for unit in range(14) if unit not in (3, 4, 5, 6)), "by hand", unit="half")
    short, gates = cut(model, mask), HalfGates(model)
    with gates.use(gates_of(mask)):
        for rows in (ids[:, :8], ids[:1, :5]):
            gated = model(input_ids=rows, use_cache=False).logits
            assert torch.equal(gated, short(input_ids=rows, use_cache=False).logits)
    gates.remove()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_is_equal_to_the_last_bit_too(dtype: torch.dtype) -> None:
    model, ids = tiny_model("llama"), tiny_ids()
    for weight in model.parameters():  # not the rotary frequencies, as loading keeps them
        weight.data = weight.data.to(dtype)
    short = cut(model, mask_of_halves())
    gates = HalfGates(model)
    with gates.use(gates_of(mask_of_halves())):
        gated = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(gated, short(input_ids=ids, use_cache=False).logits)
    assert gated.dtype == dtype


@torch.no_grad()
def test_an_observer_sees_the_stream_around_each_layer() -> None:
    model, ids = tiny_model("llama"), tiny_ids()
    states = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    gates, seen = HalfGates(model), []
    with gates.use(None, lambda *call: seen.append(call)):
        model(input_ids=ids, use_cache=False)
    assert [layer for layer, *_ in seen] == list(range(LAYERS))
    for layer, h_in, h_out in seen:
        assert torch.equal(h_in, states[layer])
        assert layer == LAYERS - 1 or torch.equal(h_out, states[layer + 1])  # the last is normed


@torch.no_grad()
def test_gates_are_nested_and_removed_without_a_trace() -> None:
    model, ids = tiny_model("gpt2"), tiny_ids()
    plain = model(input_ids=ids, use_cache=False).logits
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    gates, closed = KINDS["half"].gate(model), gates_of(mask_of_halves())
    with gates.use(closed):
        outer = model(input_ids=ids, use_cache=False).logits
        with gates.use(None):
            assert torch.equal(model(input_ids=ids, use_cache=False).logits, plain)
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, outer)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, plain)
    gates.remove()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert all(not layer._forward_hooks for layer in decoder_layers(model)[1])


def test_the_picture_of_a_mask_of_halves_is_of_that_mask() -> None:
    first, again = (figures.svg(figures.mask_strip(mask_of_halves())) for _ in range(2))
    other = figures.svg(figures.mask_strip(mask_of_halves((0, 1, 2, 3, 4, 5, 8, 9, 12, 13))))
    assert first == again != other
    assert "feed-forward" in first
