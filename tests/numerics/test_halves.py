"""Halves of layers: half-gated parent = recombined cut, to the last bit, whatever the family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from src.errors import ConfigError
from src.mask import Mask
from src.models.constraints import constraints
from src.models.cut import cut
from src.models.gated import GatedLayers
from src.models.structure import Misfit
from src.units.half_gates import HalfGates
from src.units.halves import find_halves
from src.units.kinds import KINDS
from tests import families
from tests.tiny import FAMILIES, LAYERS, tiny_ids, tiny_model

SIDE_BY_SIDE = {"gpt_neox": "side by side", "cohere2": "side by side", "phi": "once"}
ONE_ADDITION = {"mamba": "once", "openai-gpt": "does not add"}
REFUSED = SIDE_BY_SIDE | ONE_ADDITION
FIT = sorted(FAMILIES.keys() - REFUSED.keys())
KEEP = (0, 1, 2, 3, 4, 7, 8, 9, 12, 13)
"""Attention of layers 0, 1, 2, 4, 6 and feed-forward of 0, 1, 3, 4, 6: new layer 2 is recombined."""


def half_mask(keep: tuple[int, ...] = KEEP) -> Mask:
    return Mask("m", LAYERS, keep, "by hand", unit="half")


def gates_of(mask: Mask) -> Tensor:
    return torch.zeros(mask.units).index_fill(0, torch.tensor(mask.keep), 1.0)


@pytest.fixture
def gated() -> Iterator[Callable[[PreTrainedModel], HalfGates]]:
    made: list[HalfGates] = []

    def make(model: PreTrainedModel) -> HalfGates:
        made.append(HalfGates(model))
        return made[-1]

    yield make
    for gates in made:
        gates.remove()


@pytest.mark.parametrize("family", FIT)
@torch.no_grad()
def test_half_gated_parent_is_the_recombined_cut(
    family: str, gated: Callable[[PreTrainedModel], HalfGates], tmp_path: Path
) -> None:
    model, ids = tiny_model(family), tiny_ids()
    plain = model(input_ids=ids, use_cache=False).logits
    gates = gated(model)
    with gates.use(torch.ones(2 * LAYERS)):
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, plain), "open gates are the parent"
    with gates.use(gates_of(half_mask())):
        hard = model(input_ids=ids, use_cache=False).logits
    assert (hard - plain).abs().max() > 1e-2, "the mask removes something"
    assert gates.evaluated == LAYERS + len(KEEP) / 2, "closed halves do not run"
    short = cut(model, half_mask())
    assert torch.equal(short(input_ids=ids, use_cache=False).logits, hard)
    short.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    again._apply(torch.clone)
    assert torch.equal(again(input_ids=ids, use_cache=False).logits, hard)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe", "bloom", "opt"])
@torch.no_grad()
def test_both_halves_of_a_layer_are_the_layer(
    family: str, gated: Callable[[PreTrainedModel], HalfGates]
) -> None:
    model, ids = tiny_model(family), tiny_ids()
    gates_U = torch.ones(2 * LAYERS)
    gates_U[[4, 5, 10, 11]] = 0
    gates = gated(model)
    with gates.use(gates_U):
        by_half = model(input_ids=ids, use_cache=False).logits
    gates.remove()
    layers = GatedLayers(model)
    with layers.use(gates_U[::2]):
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, by_half)
    layers.remove()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "mixtral", "bloom"])
def test_gradients_of_the_gates_are_those_of_full_autograd(
    family: str, gated: Callable[[PreTrainedModel], HalfGates]
) -> None:
    model, ids = tiny_model(family).requires_grad_(False), tiny_ids()
    values = torch.ones(2 * LAYERS)
    values[[3, 6, 7, 10]], values[5] = 0.0, 0.4

    def gradient(use: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = values.clone().requires_grad_()
        (grad,) = torch.autograd.grad(use(leaf).square().mean(), leaf)
        return grad

    def plainly(leaf: Tensor) -> Tensor:
        hooks = []
        for index, (layer, halves) in enumerate(zip(gates.layers, gates.halves, strict=True)):
            for half, writer in enumerate(halves.writers):

                def scale(_m: object, _i: object, out: object, at: int = 2 * index + half) -> object:
                    return out * leaf[at] if isinstance(out, Tensor) else (out[0] * leaf[at], *out[1:])

                hooks.append(layer.get_submodule(writer).register_forward_hook(scale))
        logits = model(input_ids=ids, use_cache=False).logits
        for hook in hooks:
            hook.remove()
        return logits

    gates = gated(model)

    def ours(leaf: Tensor) -> Tensor:
        with gates.use(leaf):
            return model(input_ids=ids, use_cache=False).logits

    found = gradient(ours)
    gates.checkpoint_activations = True
    recomputed = gradient(ours)
    gates.remove()
    expected = gradient(plainly)
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()
    assert (recomputed - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_layers_that_are_no_two_halves_are_refused_by_what_they_do(family: str) -> None:
    with pytest.raises(Misfit, match=REFUSED[family]):
        find_halves(tiny_model(family))
    with pytest.raises(ConfigError, match=f"'{family}'"):
        cut(tiny_model(family), half_mask())


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("falcon", "side by side"),
        ("falcon_h1", "adds 'mamba' to the residual stream beside"),
        ("reformer", "does not run on a stream alone"),
    ],
)
def test_layers_that_only_look_like_two_halves_are_refused(family: str, reason: str) -> None:
    """One adds attention to feed-forward in place; one mixes tokens by two modules; one has two streams."""
    with pytest.raises(Misfit, match=reason):
        find_halves(families.tiny_model(family))


def test_halves_of_layers_that_do_not_fit_each_other_are_refused_before_masks_are_drawn() -> None:
    """A mask of two kinds fails at the cut, one of a single kind does not; a search would meet both."""
    model = families.tiny_model("olmo_hybrid")
    limits = constraints(model.config)
    with pytest.raises(Misfit, match=r"attention of layer \d.*'olmo_hybrid' does not fit the feed-forward"):
        KINDS["half"].gate(model, limits=limits)
    mixed = Mask("m", 7, tuple(u for u in range(14) if u not in (5, 6)), "by hand", unit="half")
    with pytest.raises(ConfigError, match="instead of"):
        cut(model, mixed)
    alike = Mask("m", 7, tuple(u for u in range(14) if u not in (7, 8)), "by hand", unit="half")
    assert cut(model, alike).config.num_hidden_layers == 6


@pytest.mark.parametrize("family", ["lfm2", "deepseek_v2", "gemma3_text", "qwen3_next", "diffllama"])
def test_halves_of_unlike_layers_that_fit_are_searched(family: str) -> None:
    model = families.tiny_model(family)
    gates = KINDS["half"].gate(model, limits=constraints(model.config))
    assert len(gates) == 2 * len(gates.layers)
    gates.remove()


def test_an_addition_inside_a_module_of_a_half_is_none_beside_it() -> None:
    halves = find_halves(families.tiny_model("cpmant"))
    assert halves[0].writers == ("self_att.self_attention", "ffn.ffn")


@torch.no_grad()
def test_a_wrong_pairing_is_caught_by_the_stream(gated: Callable[[PreTrainedModel], HalfGates]) -> None:
    """The norm of the wrong half, or the two halves swapped: same shapes, other logits."""
    model, ids = tiny_model("llama"), tiny_ids()
    gates = gated(model)
    with gates.use(gates_of(half_mask())):
        hard = model(input_ids=ids, use_cache=False).logits
    right = cut(model, half_mask()).state_dict()
    norm = {f"model.layers.2.{name}": f"model.layers.{{}}.{name}" for name in ("input_layernorm.weight",)}
    swapped = cut(model, half_mask((0, 1, 2, 3, 6, 7, 8, 9, 12, 13))).state_dict()
    wrong_norm = {**right, **{new: swapped[new] for new in norm}}
    for state in (wrong_norm, swapped):
        short = cut(model, half_mask())
        short.load_state_dict(state)
        assert not torch.equal(short(input_ids=ids, use_cache=False).logits, hard)


def test_halves_that_do_not_pair_up_are_no_mask() -> None:
    for keep in ((0, 1, 2, 4, 5), (1, 2), (0, 1, 3, 2), (0, 2, 1, 3)):
        with pytest.raises(ConfigError, match=r"take turns|rising"):
            half_mask(keep)


def test_the_file_lists_the_layers_of_both_halves(tmp_path: Path) -> None:
    mask = half_mask()
    mask.save(tmp_path / "mask.json")
    assert Mask.load(tmp_path / "mask.json") == mask
    assert (mask.attention, mask.feed_forward) == ((0, 1, 2, 4, 6), (0, 1, 3, 4, 6))
    assert str(mask).startswith("[##af#.#] keeps 5 of 7")
    text = (tmp_path / "mask.json").read_text()
    (tmp_path / "mask.json").write_text(text.replace('"half"', '"layer"'))
    with pytest.raises(ConfigError, match="two lists"):
        Mask.load(tmp_path / "mask.json")
