"""Masks that begin at a remembered stream: equal to those from the start, and cheaper by exact counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from src.errors import ConfigError
from src.mask import Unit
from src.models.gated import freeze
from src.models.layers import decoder, decoder_layers
from src.models.midway import resumes
from src.models.prefixes import Prefixes
from src.units.kinds import KINDS, Gates
from tests.tiny import FAMILIES, LAYERS, tiny_ids, tiny_model

LISTED = ["bloom", "gpt_neo", "openai-gpt"]
"""Families whose layers return a tuple or a list."""
NO_HALVES = ["cohere2", "gpt_neox", "mamba", "openai-gpt", "phi"]
UNITS: list[Unit] = ["layer", "half"]


def hidden(model: PreTrainedModel, ids: Tensor) -> Tensor:
    states: Tensor = decoder(model)(input_ids=ids, use_cache=False).last_hidden_state
    return states


def masks(gates: Gates, unit: Unit, removed: int) -> list[Tensor]:
    """All masks without so many layers, or without as many halves, in an order that shares prefixes."""
    space = KINDS[unit].space(LAYERS, 0, removed)
    return [torch.zeros(len(gates)).index_fill(0, torch.tensor(kept), 1.0) for kept in space]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_which_families_may_begin_at_any_unit(family: str, unit: Unit) -> None:
    model = freeze(tiny_model(family))
    if unit == "half" and family in NO_HALVES:
        with pytest.raises(ConfigError):
            KINDS[unit].gate(model)
        return
    assert resumes(KINDS[unit].gate(model), lambda: hidden(model, tiny_ids())) is (family not in LISTED)


def test_a_layer_that_reads_more_than_the_stream_is_noticed() -> None:
    """Here the fifth layer adds what the second wrote, as layers do that borrow keys and values."""
    model, lent = freeze(tiny_model("llama")), list[Tensor]()
    layers = decoder_layers(model)[1]
    layers[1].register_forward_hook(lambda _m, _a, out: lent.append(out))
    layers[4].register_forward_hook(lambda _m, _a, out: out + lent.pop() if lent else out)
    assert not resumes(KINDS["layer"].gate(model), lambda: hidden(model, tiny_ids()))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("every", [1, 3, None])
@torch.no_grad()
def test_a_mask_is_the_same_from_a_remembered_stream(unit: Unit, every: int | None) -> None:
    """In any order of masks, hard or soft, left-padded, with streams in front of some units alone."""
    model = freeze(tiny_model("gemma3_text"))
    gates, ids = KINDS[unit].gate(model), tiny_ids()
    padding = torch.ones_like(ids).index_fill(1, torch.arange(3), 0)
    drawn = masks(gates, unit, 2)[:: 5 if unit == "layer" else 40]
    drawn += [torch.linspace(0.1, 1.0, len(gates)), torch.ones(len(gates)), drawn[0]]
    prefixes = Prefixes(every)
    hidden(model, ids)
    for gates_U in drawn:
        with gates.use(gates_U):
            expected = model(input_ids=ids, attention_mask=padding, use_cache=False).logits
        with gates.remember(prefixes), gates.use(gates_U):
            found = model(input_ids=ids, attention_mask=padding, use_cache=False).logits
        assert torch.equal(found, expected)
        assert len(prefixes) <= (0 if every is None else 2 * ((len(gates) - 1) // every))


@pytest.mark.parametrize(("unit", "shared", "apart"), [("layer", 55, 105), ("half", 285, 660)])
@torch.no_grad()
def test_a_walk_runs_each_edge_of_the_tree_of_masks_once(unit: Unit, shared: int, apart: int) -> None:
    model, ids = freeze(tiny_model("llama")), tiny_ids()
    gates, prefixes = KINDS[unit].gate(model), Prefixes()
    hidden(model, ids)
    drawn, before = masks(gates, unit, 2), gates.evaluated
    for gates_U in drawn:
        with gates.remember(prefixes), gates.use(gates_U):
            hidden(model, ids)
    edges = {tuple(gates_U[: u + 1].tolist()) for gates_U in drawn for u in range(len(gates)) if gates_U[u]}
    assert gates.evaluated - before == shared / gates.each == len(edges) / gates.each
    assert apart == sum(int(gates_U.sum()) for gates_U in drawn)
