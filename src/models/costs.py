"""Count the operations that a model takes to run, and its weights, with the weights loaded or without.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PretrainedConfig, PreTrainedModel

from src.errors import ConfigError, first_line
from src.models.attention import FORWARD, attention_flops
from src.models.cut_config import weightless
from src.models.decoding import step

PROMPT, NEW = 128, 32
"""Tokens that a benchmark reads, and that it decodes, unless it is told otherwise."""


def flops(model: PreTrainedModel, ids_BT: Tensor, new_tokens: int) -> tuple[int, int]:
    """Count the floating-point operations (matrix products, attention) of reading prompts and of decoding.

    Args:
        model: a causal language model; it may be on the meta device.
        ids_BT: the prompts.
        new_tokens: tokens to decode behind each.

    Returns:
        Operations of reading, and of decoding all new tokens.
    """
    with counting() as prefill:
        token_B1, cache = step(model, ids_BT)
    with counting() as decode:
        for _ in range(new_tokens):
            token_B1, cache = step(model, token_B1, cache=cache)
    return prefill.get_total_flops(), decode.get_total_flops()


def counting() -> FlopCounterMode:
    """Return a context that counts the floating-point operations of its block: matrix products, attention."""
    return FlopCounterMode(display=False, custom_mapping=dict.fromkeys(FORWARD, _fused))


def _fused(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return attention_flops(query, key, value)


def parameters(model: PreTrainedModel) -> int:
    """Count the weights of a model, tied ones once; two that bitsandbytes packs into a byte are two."""
    packed = ((p, getattr(p, "quant_state", None)) for p in model.parameters())
    return sum(p.numel() if state is None else state.shape.numel() for p, state in packed)


def parameters_of(config: PretrainedConfig) -> int:
    """Count the weights of a model from its config alone, as :func:`parameters` does."""
    model = weightless(config)
    model.tie_weights()  # a part of the initialisation, which is left out
    return parameters(model)


@torch.inference_mode()
def decode_flops(config: PretrainedConfig) -> float:
    """Count the floating-point operations of decoding one token, from a config alone.

    It is the mean over what a benchmark decodes by default: ``NEW`` tokens behind a prompt of ``PROMPT``, in
    one row. The cost of a token is linear in the number of tokens before it, so the mean over the middle two
    is that over all.

    Raises:
        ConfigError: what this family computes depends on values, and a model without weights has none.
    """
    model = weightless(config).bfloat16()  # of experts the only type that torch knows the shapes of
    prompt = PROMPT + NEW // 2 - 1
    try:
        return flops(model, torch.ones(1, prompt, dtype=torch.long, device="meta"), 2)[1] / 2
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as e:
        raise ConfigError(
            f"model.target: the operations of a '{config.model_type}' cannot be counted without its weights "
            f"({first_line(e)[:120]}). Give parameters or memory_gib in place of speedup, or model.ratio."
        ) from e
