"""How each per-layer attribute of a config follows its layers when some of them are removed.

``num_hidden_layers`` is never alone: types, windows, expert placement and key/value sharing are stored as
lists of the model's length, lists of layer indices, counts from either end, or periods. One table says which
attribute is of which kind; there is no code for any family. An unknown list of the model's length is taken
to hold one entry for each layer. What no rule can express is not approximated: :mod:`src.models.cut` compares
every layer of the cut model with its original, and the proof of an export compares the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PretrainedConfig

Section = dict[str, Any]
"""The part of a serialised config that describes the text decoder."""

LAYER_COUNTS = (
    "num_hidden_layers",
    "num_layers",
    "n_layers",
    "n_layer",
    "num_blocks",
    "decoder_layers",
    "encoder_layers",
    "num_decoder_layers",
    "num_encoder_layers",
)
"""A decoder taken out of an encoder-decoder family may read its depth from either side."""

INDEX_LISTS = (
    "attn_layer_indices",
    "cross_attention_layers",
    "full_attn_idxs",
    "hybrid_layer_ids",
    "local_layer_ids",
    "mlp_only_layers",
    "moe_layers",
)
ONE_BASED_INDEX_LISTS = ("full_attn_layers", "kda_layers", "ple_layer_ids")
PREFIX_COUNTS = (
    "first_k_dense_replace",
    "max_window_layers",
    "moe_layer_start_index",
    "num_dense_layers",
)
LAST_INDICES = ("moe_layer_end_index",)
SUFFIX_COUNTS = ("num_kv_shared_layers",)
INDEX_MAPPINGS = ("per_layer_config",)
DEPTH_SCALES = ("scale_depth",)
"""Factors that the family divides by the square root of the depth before use."""
STRINGS = ("hybrid_override_pattern",)
"""Texts with one character for each layer."""

OF_FEED_FORWARD = (
    "decoder_sparse_step",
    "first_k_dense_replace",
    "intermediate_size",
    "mlp_layer_types",
    "mlp_only_layers",
    "moe_layer_end_index",
    "moe_layer_start_index",
    "moe_layers",
    "num_dense_layers",
)
"""Settings of the feed-forwards, which follow them where halves of different layers are recombined."""

NOT_PER_LAYER = (
    "architectures",
    "axial_pos_embds_dim",
    "axial_pos_shape",
    "eos_token_id",
    "languages",
    "mlp_multipliers",
    "ssm_multipliers",
    "time_step_limit",
)
"""Lists of something else, which may happen to be as long as the model is deep."""

EXTRA_LAYERS: dict[str, Any] = {
    "num_nextn_predict_layers": 0,
    "num_mtp_layers": 0,
    "num_mtp_modules": 0,
    "mtp_num_hidden_layers": 0,
    "use_mtp": False,
    "mtp_layer_types": None,
    "mtp_mlp_layer_types": None,
    "mtp_local_layer_ids": None,
    "mtp_per_layer_config": None,
}
"""Settings of multi-token-prediction heads, with their value in a cut model.

No causal-LM class of transformers holds these heads, so they do not survive a cut.
"""


FORBIDDEN = {
    "backbone_hidden_size": "drafts for another model, whose keys and values its layers read",
    "n_layers_per_attn_res_block": "adds up blocks of layers beside the residual stream, so that a closed "
    "layer is not a removed one",
    "num_hashes": "computes in two reversible streams, and a gate closes only one of them",
    "router_hidden_size": "hands the state of each router to the next layer, beside the residual stream",
    "use_mems_eval": "carries a second stream (the query) through its layers, which a gate does not close",
    "rescale_every": "halves its weights by position in evaluation; set `rescale_every` to 0 in the parent's "
    "config.json, which computes the same, and cut that",
}
"""Settings under which no cut is exact, whatever the mask; with what such a model does."""


def slice_section(
    section: Section, length: int, keep: Sequence[int], feed_forward: Sequence[int] | None = None
) -> Section:
    """Return a copy of a decoder's config dict in which each per-layer entry covers the kept layers alone.

    Args:
        section: the config of the parent's text decoder, as a dict.
        length: number of layers of the parent.
        keep: layers that stay, rising.
        feed_forward: layers whose feed-forwards stay, if a recombined cut takes them from others than
            ``keep``.
    """
    if feed_forward is not None and tuple(feed_forward) != tuple(keep):
        other = slice_section(section, length, feed_forward)
        own = slice_section(section, length, keep)
        return {name: (other if name in OF_FEED_FORWARD else own)[name] for name in own}
    new = {old: position for position, old in enumerate(keep)}
    by_kind: list[tuple[Sequence[str], Callable[[Any], Any]]] = [
        (INDEX_LISTS, lambda v: [new[i] for i in v if i in new]),
        (ONE_BASED_INDEX_LISTS, lambda v: [new[i - 1] + 1 for i in v if i - 1 in new]),
        (PREFIX_COUNTS, lambda v: sum(i < v for i in keep)),
        (LAST_INDICES, lambda v: sum(i <= v for i in keep) - 1),
        (SUFFIX_COUNTS, lambda v: sum(i >= length - v for i in keep)),
        (INDEX_MAPPINGS, lambda v: {str(new[int(i)]): v[i] for i in v if int(i) in new}),
        (DEPTH_SCALES, lambda v: _rescaled(v, length, len(keep))),
        (STRINGS, lambda v: "".join(v[i] for i in keep)),
        (NOT_PER_LAYER, lambda v: v),
    ]
    rules = {name: rule for names, rule in by_kind for name in names}

    def follow(name: str, value: Any) -> Any:
        if not value and value != 0:
            return value
        if name in LAYER_COUNTS:
            return len(keep) if value == length else value
        if name in EXTRA_LAYERS:
            return EXTRA_LAYERS[name]
        if name in rules:
            return rules[name](value)
        if isinstance(value, dict):  # by name alone: a list of the length may be a frequency table
            return {k: rules[k](v) if v and k in rules else v for k, v in value.items()}
        if isinstance(value, list | tuple) and len(value) == length:
            return [value[i] for i in keep]
        return value

    sliced = {name: follow(name, value) for name, value in spell_out_periods(section, length).items()}
    if "attention_types" in sliced:  # GPT-Neo stores runs and rebuilds the list from them
        sliced["attention_types"] = [[[kind], 1] for kind in sliced["attention_layers"]]
    return sliced


def _rescaled(scale: float, length: int, kept: int) -> float:
    """Return the scale whose quotient by the root of the new depth equals the parent's, or is the nearest.

    Equal to the last bit of float64 it can be where floats lie dense enough; in float32 it always is.
    """
    quotient = scale / math.sqrt(length)
    guess = quotient * math.sqrt(kept)
    near = (guess, math.nextafter(guess, math.inf), math.nextafter(guess, 0.0))
    return next((x for x in near if x / math.sqrt(kept) == quotient), guess)


def spell_out_periods(section: Section, length: int) -> Section:
    """Return a copy of a decoder's config dict with periods ("every second layer") as explicit lists.

    Args:
        section: the config of the text decoder, as a dict.
        length: its number of layers.
    """
    out = dict(section)
    step = out.get("decoder_sparse_step") or 1
    if step > 1 and "mlp_only_layers" in out:
        dense = {i for i in range(length) if (i + 1) % step} | set(out["mlp_only_layers"] or ())
        out.update(mlp_only_layers=sorted(dense), decoder_sparse_step=1)
    if out.get("block_types"):
        out["block_types"] = (list(out["block_types"]) * length)[:length]
    return out


def forbidden(config: PretrainedConfig) -> str | None:
    """Return why no layer of this model can be removed, as words that follow "this model"; or None."""
    parts = config, config.get_text_config(decoder=True)
    return next((why for name, why in FORBIDDEN.items() if any(getattr(p, name, None) for p in parts)), None)


def attention_layers(config: PretrainedConfig) -> frozenset[int]:
    """Return the attention layers of a hybrid, which also has recurrent or convolution layers; else none.

    The cache of such a hybrid counts tokens in an attention layer, and fails without any.
    """
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or []
    attend = {i for i, kind in enumerate(kinds) if kind.endswith("attention") and "linear" not in kind}
    return frozenset(attend) if len(attend) < len(kinds) else frozenset()


def extra_layers(config: PretrainedConfig) -> int:
    """Return how many multi-token-prediction layers the parent's config counts; a cut leaves them out."""
    text = config.get_text_config(decoder=True)
    counts = [name for name, none in EXTRA_LAYERS.items() if none == 0 and none is not False]
    return max(getattr(text, name, None) or 0 for name in counts)


def lenders(config: PretrainedConfig) -> dict[int, set[int]]:
    """Return the layers whose results other layers use directly, each with the layers that use them.

    These are key/value sharing (Gemma-3n, Gemma-4), shared sparse-attention indices (GLM, Hunyuan), a cache
    that counts tokens in the first layer (MiniMax), and the first text layers of DeepStack vision models,
    after which visual features are added by position.
    """
    text = config.get_text_config(decoder=True)
    types = getattr(text, "layer_types", None) or []
    readers: dict[int, set[int]] = {}

    def lend(lender: int, borrower: int) -> None:
        readers.setdefault(lender, set()).add(borrower)

    modes = getattr(text, "kv_sharing_modes", None) or []
    stores = {types[i]: i for i, mode in enumerate(modes) if mode == "store"}
    for i, mode in enumerate(modes):
        if mode == "reuse":
            lend(stores[types[i]], i)
    full = 0
    for i, kind in enumerate(getattr(text, "indexer_types", None) or []):
        full = full if kind == "shared" else i
        if full != i:
            lend(full, i)
    if getattr(text, "full_attn_alpha_factor", None):  # MiniMax's cache counts tokens in layer 0
        readers[0] = set(range(1, text.num_hidden_layers))
    vision = getattr(config, "vision_config", None)
    for i in range(len(getattr(vision, "deepstack_visual_indexes", None) or ())):
        readers[i] = set(range(text.num_hidden_layers)) - {i}
    return readers
