"""The laws of growing: nested sizes, greedy by divergence, and the parent itself at the end."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from transformers import PreTrainedModel

from src.data.batches import Supervised
from src.grow.growth import DIVERGENCE, Grown, GrowthProbe, beside, grow, parents_signal
from src.grow.host import OUTSIDE, Host
from src.mask import Mask, Unit
from src.models.cut import cut
from src.models.head import OutputHead
from src.units.alternating import Alternating
from src.units.spaces import AnyOf
from tests.tiny import LAYERS, tiny_ids, tiny_model

MASKS: dict[Unit, tuple[int, ...]] = {"layer": (0, 2, 3, 6), "half": (0, 1, 2, 5, 6, 7, 12, 13)}
"""Of halves: the attention of layer 1 with the feed-forward of 2, and a gap."""


def mask_of(unit: Unit) -> Mask:
    return Mask("m", LAYERS, MASKS[unit], "test", unit=unit)


def trained(model: PreTrainedModel) -> PreTrainedModel:
    """The model with all of its weights a little elsewhere."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_ids()).logits


def walked(unit: Unit, recovered: bool, family: str = "llama") -> tuple[Host, GrowthProbe, PreTrainedModel]:
    """A host, its probe, and what the recovered model was."""
    parent, mask = tiny_model(family), mask_of(unit)
    student = trained(cut(parent, mask)) if recovered else cut(parent, mask)
    rows = [Supervised.of({"input_ids": ids, "labels": ids}) for ids in (tiny_ids(seed=1), tiny_ids(seed=2))]
    signals = [parents_signal(OutputHead(parent), each) for each in rows]
    before, host = copy.deepcopy(student), Host(parent, student, mask)
    return host, GrowthProbe(host, rows, signals), before


@pytest.mark.parametrize("unit", MASKS)
def test_growing_an_unrecovered_cut_back_gives_the_parent(unit: Unit) -> None:
    host, probe, _ = walked(unit, recovered=False)
    curve = list(grow(host, probe))
    host.gates.remove()
    whole = Mask("m", LAYERS, curve[-1].keep, "test", unit=unit)
    assert torch.equal(logits(cut(host.model, whole)), logits(tiny_model("llama")))
    assert curve[-1].kl == pytest.approx(0.0, abs=1e-6) != curve[0].kl


@pytest.mark.parametrize("unit", MASKS)
def test_sizes_are_nested_one_layer_apart_and_legal(unit: Unit) -> None:
    curve = list(grow(*walked(unit, recovered=True)[:2]))
    depths = [Mask("m", LAYERS, grown.keep, "test", unit=unit).depth for grown in curve]
    assert depths == [4, 5, 6, 7]
    for small, large in pairwise(curve):
        assert {*small.keep} < {*large.keep}
        assert large.recovered <= small.recovered


@pytest.mark.parametrize("unit", MASKS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2 ties its embeddings
def test_a_host_is_the_recovered_model_or_the_parent(unit: Unit, family: str) -> None:
    host, _, student = walked(unit, recovered=True, family=family)
    parent, mask = tiny_model(family).state_dict(), host.mask
    assert torch.equal(logits(cut(host.model, mask)), logits(student))
    assert any(not torch.equal(parent[name], tensor) for name, tensor in host.model.state_dict().items())
    host.exchange(host.parts)
    assert all(torch.equal(parent[name], tensor) for name, tensor in host.model.state_dict().items())
    host.exchange(host.parts)
    assert torch.equal(logits(cut(host.model, mask)), logits(student))


@pytest.mark.parametrize("unit", MASKS)
def test_the_first_step_is_the_best_of_all_that_it_may_take(unit: Unit) -> None:
    """By cuts of copies, one after the other, without gates and shared prefixes."""
    host, probe, _ = walked(unit, recovered=True)
    kept, found = host.mask.keep, list[Grown]()
    space = AnyOf(LAYERS, 5) if unit == "layer" else Alternating(2 * LAYERS, 10)
    for keep in space.holding(kept):
        for restored in (frozenset(), beside(kept, keep), host.parts):
            host.exchange(restored)
            model = cut(host.model, Mask("m", LAYERS, keep, "test", unit=unit))
            host.exchange(restored)
            found.append(Grown(keep, host.parts - restored, divergence(model, probe)))
    _, first, *_ = grow(host, probe)
    best = min(found, key=lambda each: each.kl)
    assert (first.keep, first.recovered) == (best.keep, best.recovered)
    assert first.kl == pytest.approx(best.kl, rel=1e-5)
    assert len({round(each.kl, 6) for each in found}) == len(found)  # so that the choice is one


@torch.no_grad()
def divergence(model: PreTrainedModel, probe: GrowthProbe) -> float:
    """From the untouched parent, over all positions of all batches."""
    own, theirs, total, count = OutputHead(model), OutputHead(tiny_model("llama")), 0.0, 0
    for rows in probe.rows:
        own_NH = own.hidden(rows.batch).flatten(0, 1)[rows.index_N]
        signal = parents_signal(theirs, rows)
        total += float(DIVERGENCE(own, own_NH, rows.labels_N, signal)["loss"]) * len(rows)
        count += len(rows)
    return total / count


def test_a_space_that_holds_a_set_has_all_that_contain_it() -> None:
    for space, larger in ((AnyOf(6, 3), AnyOf(6, 4)), (Alternating(10, 4), Alternating(10, 6))):
        for kept in space:
            assert list(larger.holding(kept)) == [other for other in larger if {*kept} <= {*other}]


def test_the_units_beside_a_gap() -> None:
    assert beside((0, 2, 6), (0, 2, 4, 6)) == {2, 6}
    assert beside((2, 3), (0, 2, 3)) == {2}
    assert beside((0, 1, 6, 7), (0, 1, 2, 5, 6, 7)) == {1, 6}
    assert OUTSIDE not in beside((0,), (0, 1))
