"""Units of width: gated parent = narrower cut, to rounding, whatever the family; or a reason why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from src.errors import ConfigError
from src.mask import Mask, Unit
from src.models.cut import cut
from src.models.structure import Misfit
from src.units.amount import Amount
from src.units.kinds import KINDS
from src.units.narrower import try_narrower
from src.units.targets import Target
from src.units.width import find_width
from src.units.width_gates import WidthGates
from tests import families
from tests.tiny import FAMILIES, LAYERS, tiny_config, tiny_ids, tiny_model

ROUNDING = 2e-5
"""Of logits of size 1 to 5, in float32: measured at most 7e-6 (Llama 4), and 1.4e-6 in all other families."""
NO_SETTING, NORM, OTHERS = "no setting", "norm over all of them", "that other layers have"
REFUSED: dict[Unit, dict[str, str]] = {
    "channel": {
        "openai-gpt": NO_SETTING, "bloom": NO_SETTING, "phi3": "2 rows of 'mlp.gate_up_proj.weight' for each",
        "glm4": "2 rows of 'mlp.gate_up_proj.weight' for each", "gpt_oss": "'mlp.experts.gate_up_proj'",
        "mixtral": "'mlp.experts.gate_up_proj'", "qwen3_next": "'mlp.experts.gate_up_proj'",
        "llama4_text": OTHERS, "qwen3_moe": OTHERS, "deepseek_v3": OTHERS, "lfm2": "multiples of 32",
        "mamba": r"several linear maps \(mixer.x_proj, mixer.out_proj\)",
    },
    "kv_group": {
        **dict.fromkeys(("gpt2", "openai-gpt", "gpt_neo", "gpt_neox", "opt", "bloom", "mamba"), NO_SETTING),
        "phi3": "in a fused projection", "olmo2": NORM, "olmo3": NORM, "qwen3_next": OTHERS, "lfm2": OTHERS,
    },
}  # fmt: skip
CASES = [(unit, family) for unit, refused in REFUSED.items() for family in FAMILIES if family not in refused]
MISFITS = [(unit, family) for unit, refused in REFUSED.items() for family in refused]


def width_mask(unit: Unit, width: int, seed: int = 1) -> Mask:
    """A mask that keeps other units in each layer: three of four, or one of two."""
    generator, keep = torch.Generator().manual_seed(seed), max(1, width * 3 // 4)
    kept = [sorted(torch.randperm(width, generator=generator)[:keep].tolist()) for _ in range(LAYERS)]
    units = tuple(layer * width + own for layer, each in enumerate(kept) for own in each)
    return Mask("m", LAYERS, units, "by hand", unit=unit, width=width)


def gates_of(mask: Mask) -> Tensor:
    return torch.zeros(mask.units).index_fill(0, torch.tensor(mask.keep), 1.0)


@pytest.fixture
def gated() -> Iterator[Callable[[Unit, PreTrainedModel], WidthGates]]:
    made: list[WidthGates] = []

    def make(unit: Unit, model: PreTrainedModel) -> WidthGates:
        made.append(WidthGates(unit, model))
        return made[-1]

    yield make
    for gates in made:
        gates.remove()


@pytest.mark.parametrize(("unit", "family"), CASES)
@torch.no_grad()
def test_gated_parent_is_the_narrower_cut_to_rounding(
    unit: Unit, family: str, gated: Callable[[Unit, PreTrainedModel], WidthGates], tmp_path: Path
) -> None:
    model, ids = tiny_model(family), tiny_ids()
    plain = model(input_ids=ids, use_cache=False).logits
    gates = gated(unit, model)
    mask = width_mask(unit, gates.width.count)
    with gates.use(torch.ones(mask.units)):
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, plain), "open gates are the parent"
    with gates.use(gates_of(mask)):
        hard = model(input_ids=ids, use_cache=False).logits
    assert (hard - plain).abs().max() > 1e-1, "the mask removes something"
    gates.remove()
    short = cut(model, mask)
    narrow = short(input_ids=ids, use_cache=False).logits
    assert (narrow - hard).abs().max() < ROUNDING * hard.abs().max()
    short.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    again._apply(torch.clone)
    assert torch.equal(again(input_ids=ids, use_cache=False).logits, narrow), "stock transformers loads it"
    if (left := len(mask.by_layer[0])) > 1:
        assert find_width(again.config, unit).count == left
    else:
        with pytest.raises(Misfit, match="one has to stay"):
            find_width(again.config, unit)


@pytest.mark.parametrize(("unit", "family"), MISFITS)
def test_layers_that_hold_no_such_units_are_refused_by_what_they_do(unit: Unit, family: str) -> None:
    with pytest.raises(Misfit, match=REFUSED[unit][family]) as refused:
        WidthGates(unit, tiny_model(family))
    assert f"'{family}'" in str(refused.value)


def test_groups_of_layers_that_borrow_keys_and_values_are_refused() -> None:
    with pytest.raises(Misfit, match=r"'gemma4_text' read keys and values of others"):
        find_width(families.tiny_config("gemma4_text"), "kv_group")


@pytest.mark.parametrize(
    ("unit", "family"), [("channel", "llama"), ("channel", "gpt2"), ("kv_group", "qwen3")]
)
def test_gradients_reach_the_gates_of_open_and_closed_units(
    unit: Unit, family: str, gated: Callable[[Unit, PreTrainedModel], WidthGates]
) -> None:
    """They are the slopes of the loss, also of closed units, and the same where layers are recomputed."""
    model, ids = tiny_model(family).requires_grad_(False), tiny_ids()
    gates = gated(unit, model)
    values = torch.rand(len(gates), generator=torch.Generator().manual_seed(0))
    values[::3] = 0.0

    def gradient() -> Tensor:
        leaf = values.clone().requires_grad_()
        with gates.use(leaf):
            loss = model(input_ids=ids, use_cache=False).logits.square().mean()
        (grad,) = torch.autograd.grad(loss, leaf)
        return grad

    found = gradient()
    gates.checkpoint_activations = True
    assert (gradient() - found).abs().max() < 1e-6 * found.abs().max(), "recomputed outside of use"
    gates.checkpoint_activations = False
    step = 1e-2
    for at in (0, 1, len(gates) // 2, len(gates) - 1):  # central differences, in float64
        losses = []
        for sign in (1, -1):
            moved = values.double()
            moved[at] += sign * step
            with torch.no_grad(), gates.use(moved):
                losses.append(float(model.double()(input_ids=ids, use_cache=False).logits.square().mean()))
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(float(found[at]), rel=2e-2, abs=1e-5)
        model.float()


@torch.no_grad()
def test_wrong_slices_are_caught_by_the_stream(gated: Callable[[Unit, PreTrainedModel], WidthGates]) -> None:
    """Rows of another unit in a feeder, columns of another in the writer, or two layers' units swapped."""
    for unit, names in (
        ("channel", ("mlp.up_proj.weight", "mlp.gate_proj.weight", "mlp.down_proj.weight")),
        ("kv_group", ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.o_proj.weight")),
    ):
        model, ids = tiny_model("llama"), tiny_ids()
        gates = gated(unit, model)  # type: ignore[arg-type]
        mask = width_mask(unit, gates.width.count)  # type: ignore[arg-type]
        wide = gates.width.count
        next_to = sorted(unit // wide * wide + (unit + 1) % wide for unit in mask.keep)
        other = replace(mask, keep=tuple(next_to))
        with gates.use(gates_of(mask)):
            hard = model(input_ids=ids, use_cache=False).logits
        gates.remove()
        right, wrong = cut(model, mask).state_dict(), cut(model, other).state_dict()
        for name in names:
            short = cut(model, mask)
            short.load_state_dict({**right, f"model.layers.3.{name}": wrong[f"model.layers.3.{name}"]})
            moved = (short(input_ids=ids, use_cache=False).logits - hard).abs().max()
            assert moved > 100 * ROUNDING * hard.abs().max()


def test_shares_of_a_weight_add_up_to_what_the_units_hold() -> None:
    """Each unit's own rows and columns, and nothing of what belongs to none."""
    model = tiny_model("llama")
    for unit, blocks in (("channel", 3), ("kv_group", 4)):
        gates = KINDS[unit].gate(model)  # type: ignore[index]
        layer, held = gates.layers[2], 0
        for name, weight in layer.named_parameters():
            share = gates.share(2, name, weight.detach().double())
            assert len(share) == len(gates) // LAYERS
            if share.any():
                assert float(share.sum()) == pytest.approx(float(weight.double().sum()), abs=1e-9)
                held += 1
        assert held == blocks
        gates.remove()


def test_a_count_that_a_family_cannot_hold_is_refused_by_its_own_words() -> None:
    """Llama wants a hidden size that its heads divide: three of four KV groups leave six heads for 32."""
    model = tiny_model("llama", num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    with pytest.raises(ConfigError, match=r"'llama' config cannot hold this mask.*multiple"):
        cut(model, width_mask("kv_group", 4))


@pytest.mark.parametrize(
    "amount", [Amount(ratio=0.25), Amount(budgets=[0.1, 0.25]), Amount(target=Target(parameters=6e4))]
)
def test_a_family_that_does_not_run_narrower_is_refused_by_its_config(amount: Amount) -> None:
    """RWKV keeps a state as wide as another setting says."""
    config = families.tiny_config("rwkv")
    with pytest.raises(Misfit, match=r"'rwkv' does not work with \d+ of 32 channels in each layer: "):
        amount.of(config, width=find_width(config, "channel"))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_family_that_runs_narrower_or_cannot_run_without_values_is_not(family: str) -> None:
    config = tiny_config(family)
    assert Amount(ratio=0.25).of(config, width=find_width(config, "channel"))[0].remove == 12


def test_a_layer_that_reads_its_width_from_its_position_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("llama")
    width, built = find_width(config, "channel"), LlamaDecoderLayer.__init__

    def odd(self: LlamaDecoderLayer, config: LlamaConfig, layer_idx: int) -> None:
        built(self, config, layer_idx)
        self.scale = config.intermediate_size % 5

    monkeypatch.setattr(LlamaDecoderLayer, "__init__", odd)
    with pytest.raises(Misfit, match="scale is 1 instead of 3"):
        try_narrower(config, width, 36)


def test_counts_of_experts_are_no_channels_whatever_holds_them() -> None:
    """One setting of this family changes a buffer too."""
    with pytest.raises(Misfit, match="no linear map of its own"):
        find_width(families.tiny_config("kolibri1"), "channel")


def test_a_mask_of_another_width_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"made for 40 channels.*has 48"):
        cut(tiny_model("llama"), width_mask("channel", 40))


def test_the_file_lists_the_units_of_each_layer(tmp_path: Path) -> None:
    mask = width_mask("channel", 8)
    mask.save(tmp_path / "mask.json")
    assert Mask.load(tmp_path / "mask.json") == mask
    assert str(mask) == "keeps 6 of 8 channels of each layer"
    assert mask.missing == "2 of 8 channels of each layer"
    assert (mask.depth, mask.gaps, mask.recombines) == (LAYERS, (), False)
    text = (tmp_path / "mask.json").read_text()
    for wrong in (text.replace('"channel"', '"layer"'), text.replace('"width": 8', '"width": null')):
        (tmp_path / "mask.json").write_text(wrong)
        with pytest.raises(ConfigError, match="mask:"):
            Mask.load(tmp_path / "mask.json")


@pytest.mark.parametrize("keep", [(0, 1, 2), (0, 1, 1, 2), (0, 2, 3, 8), (1, 0, 2, 3), ()])
def test_layers_that_keep_unlike_counts_are_no_mask(keep: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="all as long"):
        Mask("m", 2, keep, "by hand", unit="channel", width=4)


def test_a_mask_needs_a_width_where_units_have_one_and_nowhere_else() -> None:
    for unit, width in (("channel", None), ("layer", 4)):
        with pytest.raises(ConfigError, match="width is"):
            Mask("m", 2, (0, 1), "by hand", unit=unit, width=width)  # type: ignore[arg-type]


def test_the_heads_of_a_family_are_counted_by_its_own_names() -> None:
    counted = find_width(tiny_config("phi"), "kv_group").counted
    config = counted.config(tiny_config("phi"), 1)
    assert (config.num_attention_heads, config.num_key_value_heads) == (2, 1)
    assert find_width(tiny_config("opt"), "channel").counted.each == {"ffn_dim": 1}
    assert find_width(tiny_config("gpt2"), "channel").counted.each == {"n_inner": 1}
