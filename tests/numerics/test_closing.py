"""Laws of a slow closing: the parent at first, the cut in the end, one set of weights throughout."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from src.data.batches import Supervised
from src.losses.hidden_states import HiddenStates
from src.losses.objective import Weighted
from src.mask import Mask, Unit
from src.models.cut import cut
from src.models.head import OutputHead
from src.models.opened import Opened
from src.recover import Recovery
from tests.tiny import LAYERS, problem_rows, tiny_ids, tiny_model

MASKS: dict[Unit, tuple[int, ...]] = {"layer": (1, 2, 5), "half": (0, 1, 2, 5, 6, 7, 12, 13)}
FAMILIES = ("llama", "gemma3_text", "gpt2")
"""The second has a rotary embedding and a mask of each layer type; the third ties its embeddings."""


def both(family: str, unit: Unit) -> tuple[PreTrainedModel, PreTrainedModel, Mask]:
    parent, mask = tiny_model(family), Mask("m", LAYERS, MASKS[unit], "test", unit=unit)
    return parent, cut(parent, mask), mask


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    ids = tiny_ids(seed=seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("unit", MASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_open_it_is_the_parent_and_closed_the_cut(family: str, unit: Unit) -> None:
    parent, student, mask = both(family, unit)
    opened = Opened(parent, student, mask)
    with torch.no_grad():
        assert torch.equal(opened.hidden(batch()), OutputHead(parent).hidden(batch()))
        opened.gate = 0.0
        assert torch.equal(opened.hidden(batch()), OutputHead(student).hidden(batch()))
        opened.gate = 0.5
        between = opened.hidden(batch())
    assert not torch.equal(between, OutputHead(parent).hidden(batch()))
    assert not torch.equal(between, OutputHead(student).hidden(batch()))


@pytest.mark.parametrize("unit", MASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_trains_the_students_weights_and_no_others(family: str, unit: Unit) -> None:
    parent, student, mask = both(family, unit)
    before = {name: tensor.clone() for name, tensor in parent.state_dict().items()}
    opened = Opened(parent, student, mask)  # without dropout
    opened.gate = 0.5
    opened.hidden(batch()).square().sum().backward()
    own = {id(p) for p in student.parameters()}
    assert {id(p) for p in opened.model.parameters() if p.requires_grad} == own
    body = OutputHead(student).decoder
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in body.parameters())
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in parent.state_dict().items())
    opened.gate = 0.0
    with torch.no_grad():
        assert torch.equal(opened.hidden(batch()), OutputHead(student).hidden(batch()))


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_the_interpolated_streams(recompute: bool) -> None:
    """Against hooks written by hand on the parent: h + g (F(h) - h) at the removed layers."""
    parent, student, mask = both("llama", "layer")
    opened = Opened(parent, student, mask, recompute)
    opened.gate = 0.25
    opened.hidden(batch()).square().sum().backward()
    other = tiny_model("llama")
    for index in mask.removed:
        other.model.layers[index].register_forward_hook(
            lambda _m, args, out: args[0] + 0.25 * (out - args[0])
        )
    OutputHead(other).hidden(batch()).square().sum().backward()
    for position, layer in enumerate(mask.keep):
        for own, theirs in zip(
            student.model.layers[position].parameters(), other.model.layers[layer].parameters(), strict=True
        ):
            torch.testing.assert_close(own.grad, theirs.grad, rtol=1e-3, atol=1e-5)


def test_at_first_nothing_is_lost_and_the_streams_are_the_parents(mask_file: str) -> None:
    recovery = Recovery(mask_file, closing=0.5, terms=[Weighted(HiddenStates(), 10.0)])
    recovery.configure_model()
    recovery.teacher.setup(recovery)
    rows = Supervised.of(problem_rows(4))
    figures = recovery.losses(rows)
    assert figures["states"] == 0
    assert abs(figures["loss"]) < 1e-6
    recovery.opened.gate = 0.5
    assert recovery.losses(rows)["states"] > 1e-3
    recovery.eval()
    closed = recovery.losses(rows)
    recovery.opened = None
    assert closed == recovery.losses(rows)
