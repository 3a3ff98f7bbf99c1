"""Load models and tokenizers from the Hub or a directory; every fault is one message that says what to do.

No code of a model's author runs: ``trust_remote_code`` is false at every load, and a ``pytorch_model.bin`` is
unpickled with ``weights_only``. What the config of a directory claims is compared with the weights that it
holds (:mod:`src.models.claims`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from src.errors import ConfigError
from src.models import claims
from src.models.layers import num_layers
from src.models.packed import settle
from src.models.positions import guard, position_limit

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""Type of the weights; ``auto`` is the one that the files hold."""
Quantization = Literal["int8", "nf4"]

weightless: ContextVar[bool] = ContextVar("weightless", default=False)
"""While set, models are built from their config alone, unquantised: a plan needs their shapes only."""

_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def load_config(name: str, revision: str | None = None) -> PretrainedConfig:
    """Read the config of a decoder; if the model is a directory, compare it with the headers of its weights.

    Raises:
        ConfigError: the model does not exist, is unknown to transformers, is not a decoder, or holds other
            weights than it says.
    """
    config = _read_config(name, revision)
    if claims.weight_files(name) and not weightless.get() and _quantization(config) is None:
        _fetch(name, revision, config, device_map="meta")
    return config


def _config(name: str, revision: str | None) -> PretrainedConfig:
    """Return the config of any model, as transformers reads it."""
    try:
        raw, _ = PretrainedConfig.get_config_dict(name, revision=revision)
        claims.check_counts(raw, name)
        if "auto_map" in raw and raw.get("model_type") not in CONFIG_MAPPING:
            raise ConfigError(
                f"model: '{name}' needs code of its own ('auto_map' in its config.json), and no code of a "
                f"model's author is run here: an export loads without any. Give a model of a family that "
                f"transformers itself knows, or a conversion of this one to such a family."
            )
        config: PretrainedConfig = AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=False
        )
        return config
    except ConfigError:
        raise
    except Exception as e:  # a config is foreign, and its class may raise anything
        here = f" (no such directory under {Path.cwd()})" if not Path(name).exists() else ""
        raise ConfigError(
            f"model: cannot read a config from '{name}'{here}. Give a Hub id such as "
            f"'Qwen/Qwen3-0.6B', or a directory with a config.json. Cause: {claims.cause(e)}"
        ) from e


def _read_config(name: str, revision: str | None) -> PretrainedConfig:
    """Return the config of a decoder, without the entry that points to code of its author."""
    config = _config(name, revision)
    architectures = config.architectures or []
    if not isinstance(architectures, list) or not all(isinstance(a, str) for a in architectures):
        raise ConfigError(
            f"model: architectures is {architectures!r} in '{name}'; accepted: a list of names."
        )
    decoder = any(a.endswith(_CAUSAL) for a in architectures) or not architectures
    if getattr(config, "is_encoder_decoder", False) or not decoder:
        kind = "an encoder-decoder" if getattr(config, "is_encoder_decoder", False) else "an encoder"
        raise ConfigError(
            f"model: '{name}' is {kind} ({', '.join(architectures)}); only decoders "
            f"(...ForCausalLM) can be pruned here."
        )
    num_layers(config)
    for part in (config, *(getattr(config, key, None) for key in config.sub_configs)):
        vars(part or config).pop("auto_map", None)  # its code is not used, and does not come along
    config.return_dict, config.output_hidden_states, config.output_attentions = True, False, False
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
        dtype: type of the weights that are not quantised; ``auto`` is the one that the files hold.
        quantize: ``int8`` (LLM.int8) or ``nf4``; None keeps ``dtype``.
        attention: attention implementation (``sdpa``, ``eager``, ...); None lets transformers choose.

    Raises:
        ConfigError: see :func:`load_config` and :func:`~src.models.packed.settle`; or the weights are missing
            or do not fit.
    """
    config = _read_config(name, revision)
    kind = _torch_dtype(name, config, dtype)
    keys: dict[str, Any] = {"dtype": kind, "attn_implementation": attention}
    if weightless.get():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **keys)
        model.eval()
        return model
    if quantize is not None:
        keys["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=quantize == "int8",
            load_in_4bit=quantize == "nf4",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=kind,
        )
    model = _fetch(name, revision, config, **keys)
    for file in claims.weight_files(name):
        if file.suffix == ".bin":
            rank_zero_warn(
                f"model: '{file}' is a pickle; nothing but its tensors was read. What is written here is "
                f"safetensors."
            )
    if claims.untie(model):
        rank_zero_warn(
            f"model: '{name}' says tie_word_embeddings and holds an output head that differs from its "
            f"embeddings. The head is kept, and an export says tie_word_embeddings: false."
        )
    settle(model, name)
    return guard(model.eval())


def shared_positions(names: Sequence[str], length: int) -> int:
    """Return the number of tokens in the longest row that each of some models can read.

    It is that of the shortest table of positions; ``sys.maxsize`` if no model has one. A warning says so if
    it is below ``length``.

    Args:
        names: Hub ids or directories of the models.
        length: number of tokens in a row that the user asks for.

    Raises:
        ConfigError: see :func:`load_config`.
    """
    limits = {name: limit for name in names if (limit := longest_row(name)) is not None}
    least = min(limits.items(), key=lambda item: item[1], default=("", sys.maxsize))
    if least[1] < length:
        rank_zero_warn(
            f"--max-length: the position table of '{least[0]}' ends at {least[1]}: rows are truncated there."
        )
    return least[1]


def longest_row(name: str, revision: str | None = None) -> int | None:
    """Return the most tokens that a model's table of positions allows in a sequence; None without a table.

    It reads no weight.

    Raises:
        ConfigError: see :func:`load_config`.
    """
    config = _read_config(name, revision)
    try:
        with torch.device("meta"), no_init_weights():
            return position_limit(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    except Exception as e:  # classes are foreign, and may raise anything
        hint = claims.blamed(config.to_dict(), str(e))
        raise ConfigError(f"model: cannot build '{name}': {hint}{claims.cause(e)}") from e


def _fetch(name: str, revision: str | None, config: PretrainedConfig, **keys: Any) -> PreTrainedModel:
    """Load a model and check that its weights match its config.

    With ``device_map="meta"`` among the keys, only the headers of its weights are read.
    """
    try:
        with _quiet():
            loaded = AutoModelForCausalLM.from_pretrained(
                name,
                config=config,
                revision=revision,
                output_loading_info=True,
                trust_remote_code=False,
                weights_only=True,
                **keys,
            )
    except Exception as e:  # files, quantisers and classes are foreign, and may raise anything
        claims.stored(name)  # a file that cannot be read is named
        hint = claims.blamed(config.to_dict(), str(e))
        raise ConfigError(f"model: cannot load '{name}': {hint}{claims.cause(e)}") from e
    model, info = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)  # as output_loading_info asks
    claims.check_weights(model, info, name)
    return model


def numbers(name: str, dtype: Dtype, revision: str | None = None) -> str:
    """Return the name of the type in which a model's weights are loaded, such as ``bfloat16``.

    Args:
        name: Hub id or directory.
        dtype: the setting; ``auto`` is resolved to what the files hold.
        revision: Hub revision.
    """
    if dtype != "auto":
        return dtype
    return str(_torch_dtype(name, _read_config(name, revision), dtype)).removeprefix("torch.")


def _torch_dtype(name: str, config: PretrainedConfig, dtype: Dtype) -> torch.dtype:
    """Return the torch type of a setting; for ``auto`` that of most numbers in the files, or the config's."""
    if dtype != "auto":
        return cast(torch.dtype, getattr(torch, dtype))
    return cast(torch.dtype, claims.stored_dtype(name) or config.dtype or torch.float32)


def _quantization(config: PretrainedConfig) -> Any:
    return getattr(config, "quantization_config", None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings of transformers in the block: its tables of keys repeat what our one message says."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer; without a padding token of its own it pads with its end-of-text token.

    Raises:
        ConfigError: there is no tokenizer under that name.
    """
    try:
        if (Path(name) / "config.json").is_file():  # which a tokenizer reads too
            claims.check_counts(PretrainedConfig.get_config_dict(name)[0], name)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        tokenizer("1")  # settings of a wrong type show themselves when they are used
    except ConfigError:
        raise
    except Exception as e:  # a broken file raises bare exceptions
        if (Path(name) / "config.json").is_file():
            _config(name, revision)  # a fault of its own has its own message
        raise ConfigError(f"tokenizer: cannot read one from '{name}': {claims.cause(e)}") from e
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@dataclass(frozen=True)
class Loading:
    """How a model is loaded; the fields are arguments of :func:`load_model`."""

    revision: str | None = None
    dtype: Dtype = "float32"
    quantize: Quantization | None = None
    attention: str | None = None

    def load(self, name: str) -> PreTrainedModel:
        """Load the model of a Hub id or directory."""
        return load_model(name, self.revision, self.dtype, self.quantize, self.attention)
