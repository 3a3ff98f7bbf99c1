"""A tiny config for any decoder family of transformers, from the defaults of its config class.

Sizes are replaced by name, lists that hold one entry for each layer by an irregular mixture of the values
that occur in them, and windows by ones shorter than the sequences: a wrong cut then shows. Families that need
more have a line in ``SPECIAL``.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from src.errors import ConfigError
from src.models.layers import text_config

LAYERS = 7
PATTERN = (0, 1, 1, 0, 2, 1, 0)
"""Irregular, so that no period fits it; every value occurs early and late."""

SIZES: dict[str, int | float] = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_blocks"), LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers", "num_encoder_layers"), LAYERS),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_dim", "dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(
        ("embedding_size", "lru_width", "emb_dim", "adapter_in_dim", "adapter_input_size", "adapter_out_dim"),
        32,
    ),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "d_inner", "dim_ff"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "feed_forward_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "ffn_hidden_size"), 24),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "num_linear_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_size", "qk_nope_head_dim", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("v_head_dim", "linear_key_head_dim", "linear_value_head_dim", "swa_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "dim_head", "d_kv", "attention_head_dim"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size", "attention_chunk_size"), 4),
    **dict.fromkeys(("vocab_size", "text_vocab_size"), 97),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_length"), 64),
    **dict.fromkeys(("initializer_range", "init_std", "initializer_factor"), 0.2),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank", "router_hidden_size"), 8),
    **dict.fromkeys(("expert_ffn_hidden_size", "intermediate_size_mlp", "index_head_dim"), 24),
    **dict.fromkeys(("num_experts_per_token", "index_n_heads", "altup_num_inputs", "hc_count"), 2),
    **dict.fromkeys(("vocab_size_per_layer_input", "pronunciation_vocab_size", "shape_vocab_size"), 97),
    **dict.fromkeys(("pronunciation_embed_dim", "shape_embed_dim"), 8),
    "linear_num_value_heads": 4,
    "linear_num_heads": 4,
    "linear_head_dim": 8,
    "zero_expert_num": 2,
    "index_topk": 4,
    "use_sliding_window": True,
    "is_decoder": True,
    "chunk_size": 8,
    "mamba_chunk_size": 8,
    "first_k_dense_replace": 3,
    "num_dense_layers": 3,
    "max_window_layers": 3,
    "num_kv_shared_layers": 2,
    "num_nextn_predict_layers": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

ROPE = {
    kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_expand": 2}
LATENT = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "v_head_dim": 8,
}
CONVOLVED = [("conv", "full_attention")[p % 2] for p in PATTERN]
QWEN4 = {
    "ple_layer_ids": [1, 4],
    "layer_types": [("linear_attention", "indexed_attention")[p % 2] for p in PATTERN],
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
    "ple_embed_dim": 32,
    "ngram_vocab_size_base": 50,
    "split_ngram_parts": 1,
    "make_ngram_vocab_size_divisible_by": 1,
}
DOTS3 = {
    "layer_types": [("indexed_attention", "sliding_attention")[p % 2] for p in PATTERN],
    **{f"swa_{name}": size for name, size in LATENT.items()},
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_qk_rope_head_dim": 8,
    "head_dim": 16,
    "shared_experts_intermediate_size": 24,
}

SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {**MAMBA, "attn_layer_indices": [1, 4, 5]},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": ROPE},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": DOTS3,
    "gemma3n_text": {"intermediate_size": [48] * LAYERS},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {
        **MAMBA,
        "layers_block_type": [("linear_attention", "full_attention")[p % 2] for p in PATTERN],
    },
    "jamba": {
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "expert_layer_period": 3,
        "expert_layer_offset": 2,
    },
    "lfm2": {"layer_types": CONVOLVED, "full_attn_idxs": [1, 2, 5]},
    "lfm2_moe": {"layer_types": CONVOLVED},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "expand": 2},
    "qwen4_exp_text": QWEN4,
    "reformer": {
        "is_decoder": True,
        "attn_layers": [("local", "lsh")[p % 2] for p in PATTERN],
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "feed_forward_size": 48,
    },
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_heads": 2, "chunk_size": 8},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {
        "layers_block_type": [("linear_attention", "hybrid")[i in (1, 2, 3, 5, 6)] for i in range(LAYERS)]
    },
    "zamba2": {"layers_block_type": [("linear_attention", "hybrid")[p % 2] for p in PATTERN]},
    "zaya": {"num_experts_per_tok": 1},
}

SECTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "gemma4_assistant": {
        "text_config": {
            "num_hidden_layers": LAYERS,
            "num_kv_shared_layers": LAYERS,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        }
    }
}
"""What a section must hold for the family's own default to be accepted."""


def tiny_config(family: str) -> PretrainedConfig:
    """Return a tiny config of ``family``, a model type of transformers."""
    default = AutoConfig.for_model(family, **SECTIONS.get(family, {}))
    return AutoConfig.for_model(family, **shrunk(default))


def tiny_model(family: str) -> PreTrainedModel:
    """A tiny model of any family, with weights large enough to betray a wrong cut, saved and loaded once.

    A parent is always a loaded one, and some families change weights on loading (Youtu's padding row).

    Raises:
        ConfigError: stock ``AutoModelForCausalLM`` does not load what the family saves.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        try:
            loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        except ValueError as e:
            raise ConfigError(
                f"model: AutoModelForCausalLM builds a '{family}' and does not load what it saves, so no "
                f"export could be loaded: {str(e).splitlines()[0].partition(' for this kind')[0]}."
            ) from e
    loaded.eval()._apply(torch.clone)
    return loaded


def shrunk(config: PretrainedConfig) -> dict[str, Any]:
    """The arguments that make ``config`` and its sections tiny."""
    out = _sizes(config)
    for key in config.sub_configs:
        if isinstance(section := getattr(config, key, None), PretrainedConfig):
            out[key] = shrunk(section)
            if section is not text_config(config):  # vision and audio towers are of another depth
                out[key] = {name: 2 if size == LAYERS else size for name, size in out[key].items()}
            out[key] |= SECTIONS.get(config.model_type, {}).get(key, {})
    return {**out, **SPECIAL.get(config.model_type, {})}


def _sizes(config: PretrainedConfig) -> dict[str, Any]:
    raw = config.to_dict()
    length = getattr(config, "num_hidden_layers", None)
    public = {stored: name for name, stored in config.attribute_map.items()}
    out: dict[str, Any] = {}
    for name, value in raw.items():
        size = SIZES.get(name, SIZES.get(public.get(name, "")))
        if isinstance(value, list) and len(value) == length and name != "architectures":
            values = sorted(set(value), key=value.index)
            if values == ["full_attention"] and raw.get("sliding_window"):
                values = ["sliding_attention", "full_attention"]
            out[name] = [values[p % len(values)] for p in PATTERN]
        elif name == "num_key_value_heads" and "kv_lora_rank" in raw:
            out[name] = SIZES["num_attention_heads"]  # latent attention has no groups
        elif size is not None and not isinstance(value, list | dict | str):
            out[name] = size
    return out
