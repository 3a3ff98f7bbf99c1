"""Laws of removing in turns: shares and choices worked by hand, scores by hand, moments that stay."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from src.errors import ConfigError
from src.mask import Mask, Unit
from src.models.constraints import Constraints
from src.models.cut import cut
from src.training.carry import carry
from src.units.goal import Goal
from src.units.importance import block_influence, centred, sparsities, taylor
from src.units.kinds import KINDS
from src.units.width import find_width
from tests.tiny import LAYERS, tiny_config, tiny_ids, tiny_model

EVEN = torch.tensor([0.0, 0.0, 0.0], dtype=torch.float64)
IMPORTANCE = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)


def shares(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------------- shares of layers


def test_importances_are_centred_and_at_most_one() -> None:
    torch.testing.assert_close(centred(shares(-0.9, -0.7, -0.5, -0.7)), shares(-1.0, 0.0, 1.0, 0.0))
    assert torch.equal(centred(shares(-0.9, -0.9)), shares(0.0, 0.0)), "alike: none matters more"


def test_without_amplitude_all_layers_lose_the_same() -> None:
    torch.testing.assert_close(sparsities(EVEN, IMPORTANCE, 0.05, 0.0, 0.25), shares(0.05, 0.05, 0.05))


def test_while_nothing_is_clipped_the_mean_grows_by_the_step() -> None:
    """s_l + s_base / T - A I_l, worked by hand for two steps of 0.05."""
    one = sparsities(EVEN, IMPORTANCE, 0.05, 0.02, 0.25)
    torch.testing.assert_close(one, shares(0.07, 0.05, 0.03))
    two = sparsities(one, IMPORTANCE, 0.10, 0.02, 0.25)
    torch.testing.assert_close(two, shares(0.14, 0.10, 0.06))
    assert float(two.mean()) == pytest.approx(0.10, abs=1e-15)


def test_where_shares_are_clipped_the_mean_is_met_all_the_same() -> None:
    """0.35, 0.05, -0.25 are aimed at, none below 0 or above 0.1: 0.1, 0.05, 0 after no shift."""
    torch.testing.assert_close(sparsities(EVEN, IMPORTANCE, 0.05, 0.3, 0.1), shares(0.1, 0.05, 0.0))
    lopsided = sparsities(EVEN, shares(1.0, 0.0, -0.1), 0.05, 0.3, 0.1)
    assert float(lopsided.mean()) == pytest.approx(0.05, abs=1e-12)
    assert lopsided.tolist() == pytest.approx([0.0, 0.06, 0.09])
    back = sparsities(shares(0.09, 0.0, 0.0), shares(1.0, 0.0, -1.0), 0.05, 0.02, 0.1)
    assert back.tolist() == pytest.approx([0.09, 0.02, 0.04]), "what is gone does not come back"


@pytest.mark.parametrize("seed", range(3))
def test_in_the_end_all_layers_are_as_wide(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lost = torch.zeros(5, dtype=torch.float64)
    for stage in range(1, 8):
        importance = centred(torch.rand(5, generator=generator, dtype=torch.float64))
        new = sparsities(lost, importance, 0.3 * stage / 7, 0.2, 0.3)
        assert (new >= lost).all()
        assert float(new.mean()) == pytest.approx(0.3 * stage / 7, abs=1e-12)
        lost = new
    torch.testing.assert_close(lost, torch.full_like(lost, 0.3))


# ---------------------------------------------------------------------- choices


def goal(unit: Unit, remove: int, layers: int, width: int | None = None, stay: tuple[int, ...] = ()) -> Goal:
    units = layers * (width or KINDS[unit].each or 0)
    whole = Mask("m", layers, tuple(range(units)), "test", unit=unit, width=width)
    config = tiny_config("llama", num_hidden_layers=layers)
    return Goal(whole, remove, Constraints(frozenset(stay)), config)


def test_the_least_layers_go_and_those_that_must_stay_do() -> None:
    scores = shares(5, 1, 4, 2, 3)
    assert goal("layer", 2, 5).best((0, 1, 2, 3, 4), scores, 1.0) == (0, 2, 4)
    assert goal("layer", 2, 5).best((0, 1, 2, 3, 4), scores, 0.5) == (0, 2, 3, 4)
    assert goal("layer", 2, 5, stay=(1,)).best((0, 1, 2, 3, 4), scores, 0.5) == (0, 1, 2, 4)
    assert goal("layer", 3, 7).best((0, 2, 3, 5, 6), shares(9, 1, 9, 9, 9), 1.0) == (0, 3, 5, 6), (
        "numbered anew"
    )


def test_halves_go_in_pairs_that_leave_whole_layers() -> None:
    """The two least are an attention in front and a feed-forward far behind: no ordinary layers are left."""
    scores = shares(2, 10, 8, 3, 9, 9, 9, 4)
    kept = goal("half", 1, 4).best(tuple(range(8)), scores, 1.0)
    assert kept == (0, 1, 4, 5, 6, 7), "8 + 3 is the least of all pairs in a row"
    assert goal("half", 2, 4).best(kept, shares(9, 2, 1, 9, 9, 9), 1.0) == (0, 5, 6, 7)


def test_narrow_layers_lose_their_least_units() -> None:
    """Two of four channels shall go from each of two layers: 1 + 1 if alike, 2 + 0 if the first is idle."""
    scores, turned = shares(4, 3, 2, 1, 1, 2, 3, 4), shares(0.1, 0.9)
    whole = tuple(range(8))
    assert goal("channel", 2, 2, 4).narrower(whole, scores, turned, 0.5, 0.0) == (0, 1, 2, 5, 6, 7)
    ahead = goal("channel", 2, 2, 4).narrower(whole, scores, turned, 0.5, 0.25)
    assert ahead == (0, 1, 4, 5, 6, 7)
    last = goal("channel", 2, 2, 4).narrower(ahead, scores, turned, 1.0, 0.25)
    assert last == (0, 1, 6, 7)
    woken = goal("channel", 2, 2, 4).narrower(ahead, shares(1, 2, 9, 9, 1, 2, 3, 4), turned, 1.0, 0.25)
    assert woken == (0, 1, 6, 7), "a unit that is gone has no score"


def test_layers_are_cut_to_the_widest_and_filled_up() -> None:
    wide = goal("channel", 24, 2, 48)
    wide = replace(wide, width=find_width(wide.config, "channel"))
    kept = tuple(unit for unit in wide.whole.keep if not (unit < 20 or 48 <= unit < 58))
    shape = wide.shape(kept, wide.whole.keep)
    assert [len(own) for own in shape.by_layer] == [38, 38]
    assert shape.by_layer[0] == [*range(10), *range(20, 48)], "filled up with the first that are gone"
    assert shape.by_layer[1] == [*range(10, 48)]
    assert wide.shape(kept, shape.keep) == shape
    assert wide.shape(kept[1:], shape.keep) == shape, "the second is as wide as before"


# ---------------------------------------------------------------------- scores


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_block_influence_of_layers_and_halves_by_hand(family: str) -> None:
    """The second scales what a half adds; the last tokens of a row are padding."""
    model, ids = tiny_model(family), tiny_ids()
    real = torch.ones_like(ids, dtype=torch.bool)
    real[1, 9:] = False
    added: dict[tuple[int, str], Tensor] = {}
    streams: list[Tensor] = []
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(lambda _m, _i, out, i=index: added.update({(i, "a"): out[0]}))
        layer.register_forward_hook(lambda _m, args, out: streams.extend([args[0], out]))
    run = {"input_ids": ids, "attention_mask": real.long(), "use_cache": False}
    with torch.no_grad():
        model(**run)
    factor = getattr(model.config, "residual_multiplier", 1.0)
    expected: dict[str, list[Tensor]] = {"layer": [], "half": []}
    for index in range(LAYERS):
        start, end = streams[2 * index], streams[2 * index + 1]
        middle = start + factor * added[index, "a"]
        pairs = {"layer": [(start, end)], "half": [(start, middle), (middle, end)]}
        for unit, both in pairs.items():
            cosines = [nn.functional.cosine_similarity(a[real], b[real], dim=-1).mean() for a, b in both]
            expected[unit] += [1 - cosine for cosine in cosines]
    for unit in ("layer", "half"):
        found = block_influence(model, unit, real, lambda: model(**run))
        torch.testing.assert_close(found.float(), torch.stack(expected[unit]), rtol=1e-4, atol=1e-6)


def test_taylor_by_hand() -> None:
    """A channel: rows of gate and up, a column of down. A KV group: a key and a value head, two queries."""
    model, ids = tiny_model("llama"), tiny_ids()
    loss = model(input_ids=ids, labels=ids).loss
    channels = taylor(model, find_width(model.config, "channel"), loss)
    groups = taylor(model, find_width(model.config, "kv_group"), model(input_ids=ids, labels=ids).loss)
    model(input_ids=ids, labels=ids).loss.backward()
    layer = model.model.layers[2]
    product = {name: (p * p.grad).abs() for name, p in layer.named_parameters()}
    mlp = [product[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down")]
    torch.testing.assert_close(channels[2, 5].float(), mlp[0][5].sum() + mlp[1][5].sum() + mlp[2][:, 5].sum())
    q, k, v, o = (product[f"self_attn.{name}_proj.weight"] for name in "qkvo")
    by_hand = q[16:32].sum() + k[8:16].sum() + v[8:16].sum() + o[:, 16:32].sum()
    torch.testing.assert_close(groups[2, 1].float(), by_hand)


# ---------------------------------------------------------------------- optimiser


def trained(model: PreTrainedModel, optimizer: torch.optim.Optimizer, seed: int) -> None:
    ids = tiny_ids(seed=seed)
    optimizer.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def adam(model: PreTrainedModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.requires_grad_(True).parameters(), lr=1e-3, weight_decay=0.1)


CUTS: dict[Unit, tuple[int, ...]] = {
    "layer": (0, 2, 3, 6),
    "half": (0, 1, 2, 5, 6, 7, 12, 13),
    "kv_group": tuple(2 * layer + layer % 2 for layer in range(LAYERS)),
    "channel": tuple(48 * layer + 2 * own + layer % 2 for layer in range(LAYERS) for own in range(24)),
}


@pytest.mark.parametrize(
    "unit", [pytest.param(unit, marks=[pytest.mark.slow] * (unit != "layer")) for unit in CUTS]
)
def test_what_survives_trains_as_if_the_rest_were_silenced(unit: Unit) -> None:
    """Two steps of the whole, a cut, two more: as gates at 0 on the whole, with the moments of the whole."""
    width = {"kv_group": 2, "channel": 48}.get(unit)
    mask = Mask("m", LAYERS, CUTS[unit], "test", unit=unit, width=width)
    one, other = tiny_model("llama"), tiny_model("llama")
    first, second = adam(one), adam(other)
    for seed in (1, 2):
        trained(one, first, seed)
        trained(other, second, seed)
    student = cut(one, mask).requires_grad_(True)
    carry(first, one, student, mask)
    assert first.param_groups[0]["params"] == list(student.parameters())
    assert {int(state["step"]) for state in first.state.values()} == {2}
    gates = KINDS[unit].gate(other)
    gates_U = torch.zeros(len(gates)).index_fill(0, torch.tensor(mask.keep), 1.0)
    for seed in (3, 4):
        trained(student, first, seed)
        with gates.use(gates_U):
            trained(other, second, seed)
    gates.remove()
    for (name, own), theirs in zip(student.named_parameters(), cut(other, mask).parameters(), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5, msg=name)
    fresh = adam(cut(one, mask))
    assert len(first.state) == len(list(student.parameters())) > len(fresh.state) == 0


def test_what_cannot_be_carried_is_refused() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    mask = Mask("m", 1, tuple(range(24)), "test", unit="channel", width=48)
    optimizer: Any = torch.optim.Adafactor(model.requires_grad_(True).parameters())
    trained(model, optimizer, 1)
    with pytest.raises(ConfigError, match=r"model.optimizer: it keeps row_var, col_var of another shape"):
        carry(optimizer, model, cut(model, mask).requires_grad_(True), mask)
