"""Load models and tokenizers from the Hub or a directory, with errors a person can act on."""

from __future__ import annotations

from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from src.errors import ConfigError

Dtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["int8", "nf4"]

weightless: ContextVar[bool] = ContextVar("weightless", default=False)
"""While set, models are built from their config alone, unquantised: a plan needs their shapes only."""

_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def load_config(name: str, revision: str | None = None) -> PretrainedConfig:
    """Read the config of a decoder.

    Raises:
        ConfigError: the model does not exist, is unknown to transformers, or is not a decoder.
    """
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as e:
        here = f" (no such directory under {Path.cwd()})" if not Path(name).exists() else ""
        raise ConfigError(
            f"model: cannot read a config from '{name}'{here}. Give a Hub id such as "
            f"'Qwen/Qwen3-0.6B', or a directory with a config.json. Cause: {_first_line(e)}"
        ) from e
    architectures = config.architectures or []
    decoder = any(a.endswith(_CAUSAL) for a in architectures) or not architectures
    if getattr(config, "is_encoder_decoder", False) or not decoder:
        kind = "an encoder-decoder" if getattr(config, "is_encoder_decoder", False) else "an encoder"
        raise ConfigError(
            f"model: '{name}' is {kind} ({', '.join(architectures)}); only decoders "
            f"(...ForCausalLM) can be pruned here."
        )
    return config


def load_model(
    name: str,
    revision: str | None = None,
    dtype: Dtype = "float32",
    quantize: Quantization | None = None,
    attention: str | None = None,
) -> PreTrainedModel:
    """Load a decoder in eval mode, optionally with 8-bit or 4-bit weights through bitsandbytes.

    Args:
        name: Hub id or directory.
        revision: Hub revision.
        dtype: type of the weights that are not quantised.
        quantize: ``int8`` (LLM.int8) or ``nf4``; None keeps ``dtype``.
        attention: attention implementation (``sdpa``, ``eager``, ...); None lets transformers choose.

    Raises:
        ConfigError: see :func:`load_config`; or the weights are missing or do not fit.
    """
    config = load_config(name, revision)
    keys: dict[str, Any] = {"dtype": getattr(torch, dtype), "attn_implementation": attention}
    if weightless.get():
        return AutoModelForCausalLM.from_config(config, **keys).eval()
    if quantize is not None:
        keys["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=quantize == "int8",
            load_in_4bit=quantize == "nf4",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, config=config, revision=revision, output_loading_info=True, **keys
        )
        model, info = loaded
    except (OSError, ValueError, RuntimeError) as e:
        raise ConfigError(f"model: cannot load '{name}': {_first_line(e)}") from e
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ConfigError(f"model: '{name}' lacks {len(missing)} weights, such as '{missing[0]}'.")
    for module in model.modules():
        # On some CPUs bitsandbytes would repack weights for a kernel that passes no gradient on.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer, giving it a padding token if it has none.

    Raises:
        ConfigError: there is no tokenizer under that name.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError, KeyError) as e:
        raise ConfigError(f"tokenizer: cannot read one from '{name}': {_first_line(e)}") from e
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Refuse a tokenizer that can give tokens the model has no embedding for.

    Raises:
        ConfigError: names both sizes.
    """
    highest = max(tokenizer.get_vocab().values())
    rows = cast(Tensor, model.get_input_embeddings().weight).shape[0]
    if highest >= rows:
        raise ConfigError(
            f"data.tokenizer: its tokens go up to {highest}, but the vocabulary of this "
            f"'{model.config.model_type}' has {rows}. Leave data.tokenizer out to use the model's own."
        )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
