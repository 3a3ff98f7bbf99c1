"""The cut: rules for every kind of per-layer attribute, refusals that say why, and the cut as a copy."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from src.errors import ConfigError
from src.models.constraints import Constraints, constraints
from src.models.cut import cut, cut_config
from src.models.cut_rules import slice_section
from src.models.gated import GatedLayers
from src.models.layers import decoder_layers, num_layers
from src.policies import GumbelTopK
from src.search import MaskSearch
from tests.families import tiny_config as matrix_config
from tests.tiny import FAMILIES, KV_SHARED, LAYERS, mask_of, tiny_config, tiny_ids, tiny_model

KEEP = (0, 2, 3, 5, 6)
MASK, ALL = mask_of(KEEP), mask_of(range(LAYERS))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("layer_types", list("abcdefg"), list("acdfg")),
        ("hybrid_override_pattern", "abcdefg", "acdfg"),
        ("hidden_act", "swiglu7", "swiglu7"),  # as long as the model is deep, but not a list of layers
        ("eos_token_id", list(range(7)), list(range(7))),
        ("mlp_only_layers", [0, 1, 5], [0, 3]),
        ("full_attn_idxs", [6, 1, 2, 3, 4, 5, 0], [4, 1, 2, 3, 0]),  # length 7 and yet indices
        ("ple_layer_ids", [1, 2, 4], [1, 3]),  # counted from one
        ("first_k_dense_replace", 3, 2),
        ("max_window_layers", 28, 5),
        ("moe_layer_end_index", 4, 2),
        ("num_kv_shared_layers", 3, 2),
        ("per_layer_config", {"02": {"head_dim": 8}, "4": {"head_dim": 4}}, {"1": {"head_dim": 8}}),
        ("num_nextn_predict_layers", 1, 0),
        ("mtp_num_hidden_layers", 1, 0),
        ("use_mtp", True, False),
        (
            "linear_attn_config",
            {"kda_layers": [1, 2, 3], "head_dim": 7},
            {"kda_layers": [1, 2], "head_dim": 7},
        ),
        ("rope_parameters", {"long_factor": list(range(7))}, {"long_factor": list(range(7))}),
        ("num_hidden_layers", 7, 5),
        ("encoder_layers", 3, 3),
        ("num_attention_heads", 7, 7),
        ("mlp_only_layers", None, None),
    ],
)
def test_each_kind_of_attribute_follows_its_layers(name: str, value: object, expected: object) -> None:
    assert slice_section({name: value}, LAYERS, KEEP) == {name: expected}


def test_periods_become_lists_where_the_family_has_one() -> None:
    section = {"decoder_sparse_step": 2, "mlp_only_layers": [5], "block_types": ("r", "r", "a")}
    assert slice_section(section, LAYERS, KEEP) == {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0, 1, 3, 4],  # of layers 0, 2, 5, 6; layer 3 alone has experts
        "block_types": ["r", "a", "r", "a", "r"],
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_every_layer_changes_nothing(family: str) -> None:
    config = tiny_config(family)
    before, after = config.to_dict(), cut_config(config, ALL).to_dict()
    spelt_out = {"decoder_sparse_step", "mlp_only_layers", "attention_types", "max_window_layers"}
    spelt_out.add("num_nextn_predict_layers")  # heads that no causal-LM class holds
    assert {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)} <= spelt_out
    assert cut_config(cut_config(config, ALL), ALL).to_dict() == after


def test_a_nested_config_is_cut_in_its_text_part_alone() -> None:
    text = tiny_config("gemma3_text").to_dict()
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)
    new = cut_config(config, MASK)
    assert (new.text_config.num_hidden_layers, new.vision_config.num_hidden_layers) == (len(KEEP), LAYERS)
    assert new.text_config.layer_types == [config.text_config.layer_types[i] for i in KEEP]


@pytest.mark.parametrize("tower", [2, LAYERS])
def test_a_tower_as_deep_as_the_text_decoder_is_not_taken_for_it(tower: int) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    vision = {**sizes, "num_hidden_layers": tower, "image_size": 56}
    text = tiny_config("gemma3_text").to_dict()
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)
    config.mm_tokens_per_image = 4
    model = AutoModelForCausalLM.from_config(config)
    assert decoder_layers(model)[0] == "model.language_model.layers"
    assert len(cut(model, mask_of([1, 5])).model.language_model.layers) == 2
    assert constraints(config) == Constraints()


def test_layers_that_hold_two_attentions_count_once() -> None:
    model = AutoModelForCausalLM.from_config(matrix_config("longcat_flash")).eval()
    assert num_layers(model.config) == LAYERS
    keep = [0, 2, 3, 6]
    student = cut(model, mask_of(keep))
    assert (student.config.num_layers, student.config.num_hidden_layers) == (4, 8)
    gates, ids = torch.tensor([float(i in keep) for i in range(LAYERS)]), tiny_ids()
    with GatedLayers(model).use(gates):
        assert torch.equal(model(ids).logits, student(ids).logits)


def test_the_cut_shares_no_memory_and_leaves_its_parent_alone() -> None:
    parent, ids = tiny_model("gemma2"), tiny_ids()
    before = parent(ids).logits
    student = cut(parent, MASK)
    assert student.lm_head.weight is student.model.embed_tokens.weight
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert torch.equal(parent(ids).logits, before)
    assert parent.config.num_hidden_layers == LAYERS


def test_types_mode_and_settings_are_those_of_the_parent() -> None:
    parent = tiny_model("llama").to(torch.bfloat16).train()
    parent.generation_config.top_k = 3
    student = cut(parent, MASK)
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert student.training
    assert student.generation_config.top_k == 3
    assert student.config._attn_implementation == parent.config._attn_implementation
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == list(range(len(KEEP)))


@pytest.mark.parametrize("layers", [LAYERS - 1, LAYERS + 1])
def test_a_mask_of_a_model_of_another_depth_is_refused(layers: int) -> None:
    with pytest.raises(ConfigError, match=rf"a model of {layers} layers .* has {LAYERS}"):
        cut(tiny_model("llama"), mask_of((0, 1), layers))


def test_quantised_weights_are_refused() -> None:
    model = tiny_model("llama")
    model.config.quantization_config = {"load_in_8bit": True}
    with pytest.raises(ConfigError, match="quantised weights cannot be cut"):
        cut(model, MASK)


# ---------------------------------------------------------------------- what a family cannot express


LIMITS = {
    # an attention scale that is a formula of the position
    "tail": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, Constraints(tail_only=True)),
    # experts by a period that no list can replace
    "period": (
        "jamba",
        {
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "expert_layer_period": 3,
            "expert_layer_offset": 2,
            "num_experts": 4,
        },
        Constraints(tail_only=True, period=3),
    ),
    # the first layer has a norm of its own
    "first": ("rwkv", {"rescale_every": 0, "attention_hidden_size": 32}, Constraints(frozenset({0}))),
    # weights changed in place by position
    "none": ("rwkv", {"attention_hidden_size": 32}, Constraints(frozenset(range(LAYERS)))),
    "free": ("llama", {}, Constraints()),
}


@pytest.mark.parametrize("case", LIMITS)
def test_limits_are_found_without_weights(case: str) -> None:
    family, overrides, expected = LIMITS[case]
    found = constraints(tiny_config(family, **overrides))
    assert (found.always_keep, found.tail_only, found.period) == (
        expected.always_keep,
        expected.tail_only,
        expected.period,
    )
    assert bool(found.reason) == (case != "free")


def test_a_mask_within_the_limits_is_cut_and_one_outside_is_refused_by_name() -> None:
    parent = tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    assert len(cut(parent, mask_of([0, 1, 2, 3])).transformer.h) == 4
    with pytest.raises(ConfigError, match=r"layer 3 would become layer 2.*attn\.scaling.*last layers"):
        cut(parent, mask_of([0, 1, 3, 4]))


def test_a_borrower_needs_its_lender() -> None:
    config = tiny_config("gemma3n_text", **KV_SHARED)
    assert constraints(config).always_keep == {3, 4, 6}  # the lenders, and one that borrows
    with pytest.raises(ConfigError, match=r"layer 3 is removed, but layers \[5\].*Keep layer 3 too"):
        cut_config(config, mask_of([0, 1, 2, 4, 5, 6]))
    new = cut_config(config, mask_of([0, 3, 4, 5, 6]))
    assert (new.num_kv_shared_layers, new.kv_sharing_modes) == (2, [None, "store", "store", "reuse", "reuse"])


def test_a_hybrid_keeps_at_least_one_attention_layer() -> None:
    config = tiny_config("lfm2")
    limits = constraints(config)
    assert limits.one_of == (frozenset({1, 2, 5}),)
    assert (limits.pinned(LAYERS, 2), limits.pinned(LAYERS, 3)) == (frozenset(), {1})
    with pytest.raises(ConfigError, match=r"no attention layer is left.*\[1, 2, 5\]"):
        cut_config(config, mask_of([0, 3, 4, 6]))


def test_a_family_that_asks_for_a_layer_of_another_type_says_so_before_the_search() -> None:
    config = matrix_config("olmo_hybrid")
    limits = constraints(config)
    assert sorted(map(sorted, limits.one_of)) == [[0, 3, 4, 6], [1, 2, 5]]
    assert limits.pinned(LAYERS, 4) == {0, 1}
    assert "expects at least one 'linear_attention' layer" in limits.reason
    with pytest.raises(ConfigError, match=r"cannot hold this mask: .*at least one 'linear_attention'"):
        cut_config(config, mask_of([1, 2, 5]))


def test_pinned_layers_of_a_tail_only_family_depend_on_how_many_go() -> None:
    assert Constraints(tail_only=True).pinned(7, remove=2) == frozenset(range(5))
    assert Constraints(frozenset({0})).pinned(7, remove=2) == {0}


DEMANDING = {case: LIMITS[case][:2] for case in ("tail", "period", "first")} | {
    "lenders": ("gemma3n_text", KV_SHARED),
    "hybrid": ("lfm2", {}),
}


@pytest.mark.parametrize("case", DEMANDING)
def test_every_mask_that_a_search_may_draw_can_be_cut(case: str) -> None:
    """The limits are found by single probes; here all masks that they leave are cut, and some exist."""
    family, overrides = DEMANDING[case]
    parent, limits = tiny_model(family, **overrides), constraints(tiny_config(family, **overrides))
    for remove in range(1, 4):
        free = set(range(LAYERS)) - limits.pinned(LAYERS, remove)
        masks = [sorted(set(range(LAYERS)) - set(gone)) for gone in combinations(sorted(free), remove)]
        assert masks or case == "lenders"
        for keep in masks:
            cut(parent, mask_of(keep))


def test_a_family_without_any_legal_mask_is_refused_before_the_search(tmp_path: Path) -> None:
    family, overrides, _ = LIMITS["none"]
    tiny_config(family, **overrides).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"0 may be removed.*halves its weights by position"):
        MaskSearch(str(tmp_path), GumbelTopK(), remove=2)
