"""Laws of learned weights of feed-forwards: the model holds them, the slope is exact, what falls pairs up."""

from __future__ import annotations

import math
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from src.errors import ConfigError
from src.mask import Mask
from src.models.layers import decoder_layers
from src.training.weighed import Weighed, log_slope, scored
from src.units.kinds import KINDS
from src.units.width import feed_forward_writers
from tests.numerics.test_interleaved import goal
from tests.tiny import tiny_config, tiny_ids, tiny_model

PULL = 0.1


@pytest.fixture
def made(tmp_path: Path) -> Weighed:
    """Weights of a model of six layers, of which two feed-forwards may go."""
    tiny_config("llama", num_hidden_layers=6).save_pretrained(tmp_path)
    return Weighed(str(tmp_path), remove=2, pull=PULL)


def feed_forward(family: str) -> tuple[Any, Any, str]:
    """A model, a layer in its middle, and the path of the map that ends its feed-forward."""
    model = tiny_model(family)
    return model, decoder_layers(model)[1][2], feed_forward_writers(model.config)[2]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_weight_is_in_the_model(family: str, made: Weighed) -> None:
    """Half the weight is half of what the feed-forward adds, to the last bit, with a bias too."""
    model, layer, path = feed_forward(family)
    linear = layer.get_submodule(path)
    added: list[Tensor] = []
    linear.register_forward_hook(lambda _m, _i, out: added.append(out))
    with torch.no_grad():
        model(input_ids=tiny_ids())
        assert made.weigh(linear, 1.0, float(linear.weight.norm()), 0.0, math.log(2)) == 0.5
        model(input_ids=tiny_ids())
    torch.testing.assert_close(added[1], 0.5 * added[0], rtol=1e-6, atol=0)


def test_a_step_turns_the_map_and_does_not_stretch_it(made: Weighed) -> None:
    linear = torch.nn.Linear(6, 4, bias=False)
    before, turned = float(linear.weight.detach().norm()), torch.randn(4, 6)
    linear.weight.data.copy_(3 * turned)
    weight = made.weigh(linear, 0.8, before, slope=0.0, speed=0.1)
    assert weight == pytest.approx(0.8 * math.exp(-0.1))
    expected = turned / turned.norm() * before * weight / 0.8
    torch.testing.assert_close(linear.weight.detach(), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_slope_is_that_of_a_gate_on_the_feed_forward(family: str) -> None:
    model, layer, path = feed_forward(family)
    ids = tiny_ids()
    gates = KINDS["half"].gate(model)
    gates_U = torch.ones(len(gates), requires_grad=True)
    with gates.use(gates_U):
        model(input_ids=ids, labels=ids).loss.backward()
    gates.remove()
    assert gates_U.grad is not None
    model.requires_grad_(True).zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    assert log_slope(layer.get_submodule(path)) == pytest.approx(float(gates_U.grad[5]), rel=1e-4)


@pytest.mark.parametrize(
    ("slope", "moves"), [(0.0, -1.0), (-0.03, -0.4), (-0.05, 0.0), (-0.075, 0.5), (-9.0, 1.0), (9.0, -1.0)]
)
def test_a_weight_falls_where_the_loss_resists_less_than_the_pull(
    slope: float, moves: float, made: Weighed
) -> None:
    """At half the weight the pull on its logarithm is half; nothing moves it faster than the speed."""
    linear = torch.nn.Linear(6, 4, bias=False)
    weight = made.weigh(linear, 0.5, 1.0, slope, speed=0.01)
    assert math.log(weight / 0.5) == pytest.approx(0.01 * moves, abs=1e-12)
    assert made.weigh(linear, 1.0, 1.0, -9.0, speed=0.01) == 1.0, "at most"


def test_a_quadratic_loss_keeps_what_is_worth_more_than_the_pull(made: Weighed) -> None:
    """With c (1 - w)^2 the absence costs c; the weight rests at 1 - pull / (2 c), below 1/2 if c < pull."""
    linear = torch.nn.Linear(6, 4, bias=False)
    for cost in (0.6 * PULL, 0.9 * PULL, 1.1 * PULL, 4 * PULL):
        weight = 1.0
        for _ in range(2000):
            weight = made.weigh(linear, weight, 1.0, -2 * cost * (1 - weight) * weight, speed=0.02)
        assert weight == pytest.approx(1 - PULL / (2 * cost), abs=0.01)
        assert (weight < 0.5) is (cost < PULL)


# ---------------------------------------------------------------------- what goes


def test_the_lowest_go_and_no_more_than_may(made: Weighed) -> None:
    made.weight_L[:] = torch.tensor([0.9, 0.3, 0.2, 0.5, 0.4, 0.7])
    assert made.low() == [2, 1], "4 is below, and two may go"
    made.mask = Mask("m", 6, (0, 1, 4, 5, 6, 7, 8, 9, 10, 11), "test", unit="half")
    assert made.low() == [2], "one has gone, and has a weight below too"
    made.weight_L[:] = 0.5
    assert made.low() == []


@pytest.mark.parametrize(
    ("low", "influence", "kept"),
    [
        ([1], (4, 2, 3, 4), (0, 1, 4, 5, 6, 7)),
        ([1], (4, 3, 2, 4), (0, 1, 2, 5, 6, 7)),
        ([0], (1, 2, 4, 4), (2, 3, 4, 5, 6, 7)),
        ([3], (4, 4, 4, 9), (0, 1, 2, 3, 4, 5)),
        ([1, 2], (4, 1, 2, 3), (0, 1, 6, 7)),
        ([0, 2], (1, 2, 4, 3), (2, 3, 4, 7)),
        ([], (1, 1, 1, 1), tuple(range(8))),
    ],
)
def test_with_each_feed_forward_an_attention_goes(
    low: list[int], influence: tuple[int, ...], kept: tuple[int, ...]
) -> None:
    """Between two feed-forwards the attention of most influence stays; behind the last there is none."""
    influence_U = torch.zeros(8)
    influence_U[::2] = torch.tensor(influence, dtype=torch.float32)
    whole = tuple(range(8))
    assert goal("half", 3, 4).best(whole, scored(whole, influence_U, low), len(low) / 3) == kept


def test_whatever_falls_whole_layers_are_left() -> None:
    """All proper sets of five feed-forwards: these go, no other does, and the halves pair up."""
    whole, generator = tuple(range(10)), torch.Generator().manual_seed(0)
    for low in chain.from_iterable(combinations(range(5), n) for n in range(1, 5)):
        scores_U = scored(whole, torch.rand(10, generator=generator), list(low))
        kept = goal("half", 4, 5).best(whole, scores_U, len(low) / 4)
        mask = Mask("m", 5, kept, "test", unit="half")
        assert {*mask.feed_forward} == {*range(5)} - {*low}


# ---------------------------------------------------------------------- refused


def test_a_norm_behind_the_map_is_refused(tmp_path: Path) -> None:
    model = tiny_model("gemma2")
    model.config.save_pretrained(tmp_path)
    made = Weighed(str(tmp_path), remove=1)
    made.model = model
    with pytest.raises(ConfigError, match="'gemma2' post_feedforward_layernorm stands behind mlp"):
        made.check_maps()
    made.model = tiny_model("llama", num_hidden_layers=len(model.model.layers))
    made.check_maps()


def test_a_mask_says_how_many_go_at_most_if_it_is_of_layers_or_halves(tmp_path: Path) -> None:
    tiny_config("llama", num_hidden_layers=4).save_pretrained(tmp_path)
    where = str(tmp_path / "mask.json")
    for mask in (
        Mask.by_hand(str(tmp_path), 4, (0, 1, 3)),
        Mask(str(tmp_path), 4, (0, 1, 2, 5, 6, 7), "test", unit="half"),
    ):
        mask.save(where)
        made = Weighed(str(tmp_path), mask=where)
        assert (made.goal.remove, made.mask.unit, made.mask.keep) == (1, "half", tuple(range(8)))
    narrow = tuple(48 * layer + own for layer in range(4) for own in range(24))
    Mask(str(tmp_path), 4, narrow, "test", unit="channel", width=48).save(where)
    with pytest.raises(ConfigError, match="a mask of channels given, and feed-forwards go"):
        Weighed(str(tmp_path), mask=where)
