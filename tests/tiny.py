"""Tiny decoders built from config alone: one line per family, deterministic, offline.

They are made to betray a wrong cut. ``LAYERS`` is prime, so the depth equals no head, expert or kernel
count; sliding windows (4) are shorter than the test sequences (10 and more); layer types are mixed; and
the weights have a standard deviation of 0.2, because at the usual 0.02 attention is nearly uniform and
a wrong layer type costs 1e-4 in logits.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from src.data.arithmetic import build_tokenizer, problems
from src.mask import Mask

LAYERS, VOCAB, WINDOW = 7, 97, 4

BASE: dict[str, Any] = {
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "attn_implementation": "eager",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MIXED = ["sliding_attention", "full_attention", "full_attention", "sliding_attention", "full_attention",
         "sliding_attention", "sliding_attention"]  # fmt: skip
SLIDING: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": MIXED}
KV_SHARED: dict[str, Any] = {  # of gemma3n_text: the last two layers borrow keys and values
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 3 + ["sliding_attention"],
    "sliding_window": WINDOW,
    "intermediate_size": [48] * LAYERS,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
}
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 3},
    "qwen3": {"use_sliding_window": True, **SLIDING},
    "gemma": {},
    "gemma2": {**SLIDING, "query_pre_attn_scalar": 8},
    "gemma3_text": {**SLIDING, "query_pre_attn_scalar": 8},
    "gpt2": {"n_inner": 48, "n_positions": 64},
    "openai-gpt": {"n_positions": 64},  # its layers return lists
    "gpt_neo": {
        "attention_types": [[["global", "local"], 3], [["local"], 1]],
        "window_size": WINDOW,
        "num_heads": 4,
    },
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2},
    "bloom": {"n_head": 4},
    "phi": {},
    "phi3": {"sliding_window": WINDOW},
    "olmo2": {},
    "olmo3": SLIDING,
    "smollm3": {"no_rope_layers": [1, 0, 1, 1, 0, 0, 1], "use_sliding_window": True, **SLIDING},
    "granite": {"logits_scaling": 2.0, "residual_multiplier": 0.7},
    "cohere2": {**SLIDING, "logit_scale": 0.5},
    "glm4": {},
    "gpt_oss": {**SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 4},
    "llama4_text": {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 48,
        "moe_layers": [1, 4],
        "no_rope_layers": [1, 0, 1, 1, 0, 0, 1],
        "attention_chunk_size": WINDOW,
    },
    "qwen3_moe": {**MOE, "mlp_only_layers": [1, 5], "decoder_sparse_step": 2},
    "deepseek_v3": {
        "first_k_dense_replace": 3,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 24,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "qwen3_next": {
        **MOE,
        "layer_types": ["linear_attention" if kind == "sliding_attention" else kind for kind in MIXED],
        "mlp_only_layers": [2],
        "shared_expert_intermediate_size": 24,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "lfm2": {
        "layer_types": [
            "conv",
            "full_attention",
            "full_attention",
            "conv",
            "conv",
            "full_attention",
            "conv",
        ]
    },
    "mamba": {"state_size": 8},
}


def tiny_config(family: str, **overrides: Any) -> PretrainedConfig:
    """Return the tiny config of ``family``: a key of :data:`FAMILIES`, or a type that needs no more."""
    return AutoConfig.for_model(family, **{**BASE, **FAMILIES.get(family, {}), **overrides})


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Return a tiny model of ``family`` in eval mode, fp32; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides)).eval()
        for parameter in model.parameters():  # biases and norms too: a constant betrays nothing
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def mask_of(keep: Iterable[int], layers: int = LAYERS, model: str = "m") -> Mask:
    """Return the mask of a tiny model that keeps some layers."""
    return Mask(model=model, num_layers=layers, keep=tuple(keep), method="test")


def tiny_ids(batch: int = 2, tokens: int = 13, seed: int = 0) -> torch.Tensor:
    """Return token ids ``[batch, tokens]`` without special tokens, longer than every window."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, tokens), generator=generator)


def problem_rows(count: int, prompt: int = 0) -> dict[str, torch.Tensor]:
    """Return a padded batch of problems; the first ``prompt`` tokens of each are not supervised."""
    tokenizer = build_tokenizer()
    tokenizer.padding_side = "right"
    texts = [row["question"] for row in problems("train", count, 0)]
    batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :prompt] = -100
    return {**batch, "labels": labels}


def save_arithmetic(path: Path, **keys: Any) -> str:
    """Write a random Qwen3 with the arithmetic tokenizer as a Hugging Face directory, and return its path.

    Args:
        path: the directory.
        keys: further settings of its config: layers and heads.
    """
    tokenizer = build_tokenizer()
    config = AutoConfig.for_model(
        "qwen3", vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, tie_word_embeddings=True,
        initializer_range=0.2, pad_token_id=0, eos_token_id=1, bos_token_id=None, **keys,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)
