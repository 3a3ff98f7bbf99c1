"""Compare what the config of a directory claims with what the headers of its weights hold.

transformers does not check ``config.json``. With one layer too few in the config, a model loads without a
warning. If the config calls the embeddings tied, they replace an output head that has weights of its own.
Here every fault that shows in the headers is reported before a weight is read.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import load_state_dict

from src.errors import ConfigError
from src.models.cut_rules import LAYER_COUNTS, extra_layers
from src.models.layers import decoder_layers, text_config

MOST_LAYERS = 1024
"""No decoder is nearly as deep; more is a slip, and building it would take for ever."""
STORED = (torch.float32, torch.bfloat16, torch.float16)
FILES = ("model.safetensors", "pytorch_model.bin")


def weight_files(name: str) -> list[Path]:
    """Return the files that transformers reads a directory's weights from; none for a Hub id.

    Raises:
        ConfigError: an index cannot be read, or names a file that is not there.
    """
    for single in map(Path(name).joinpath, FILES):
        index = single.with_name(f"{single.name}.index.json")
        if single.is_file():
            return [single]
        if index.is_file():
            try:
                shards = {
                    str(index.parent / shard)
                    for shard in json.loads(index.read_text())["weight_map"].values()
                }
            except (ValueError, KeyError, AttributeError, TypeError, OSError) as e:
                raise ConfigError(
                    f"model: '{index}' is no index of weights ({type(e).__name__}: {e})."
                ) from e
            if gone := sorted(shard for shard in shards if not Path(shard).is_file()):
                raise ConfigError(
                    f"model: '{index}' names {len(shards)} files, of which {len(gone)} are missing, such as "
                    f"'{gone[0]}'. Copy or download the directory again."
                )
            return sorted(map(Path, shards))
    return []


def stored(name: str) -> dict[str, Tensor]:
    """Return the tensors of a directory's weight files by name, on the meta device; none for a Hub id.

    Raises:
        ConfigError: a file is truncated, empty or of another format.
    """
    tensors: dict[str, Tensor] = {}
    for file in weight_files(name):
        try:
            tensors |= load_state_dict(str(file), map_location="meta", weights_only=True)
        except Exception as e:  # safetensors and pickle have errors of their own
            raise ConfigError(
                f"model: '{file}' holds no weights that can be read: it is truncated, damaged or of another "
                f"format ({cause(e)}). Copy or download it again."
            ) from e
    return tensors


def stored_dtype(name: str) -> torch.dtype | None:
    """Return the type (float32, bfloat16, float16) of most of a directory's weights; None if none has one."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in stored(name).values():
        if isinstance(tensor, Tensor) and tensor.dtype in STORED:
            sizes[tensor.dtype] += tensor.numel()
    return sizes.most_common(1)[0][0] if sizes else None


def check_counts(section: dict[str, Any], name: str) -> None:
    """Refuse a config whose number of layers is negative, above ``MOST_LAYERS``, a float, a string or a bool.

    Nested configs are searched too. It must be called before a model is built, which would make a list of
    that length.

    Args:
        section: a config as a dict, or a part of it.
        name: Hub id or directory, for the message.

    Raises:
        ConfigError: a number is refused; the message names its key and value.
    """
    for key, value in section.items():
        if isinstance(value, dict):
            check_counts(value, name)
            continue
        whole = isinstance(value, int) and not isinstance(value, bool)
        slip = not 0 <= value <= MOST_LAYERS if whole else isinstance(value, str | float | bool)
        if key in LAYER_COUNTS and slip:
            raise ConfigError(
                f"model: {key} is {value!r} in the config.json of '{name}'; accepted: a whole number up "
                f"to {MOST_LAYERS}. Set it to the number of layers that the weights hold."
            )


def check_weights(model: PreTrainedModel, info: dict[str, Any], name: str) -> None:
    """Refuse a directory whose weights do not match its config, by what transformers reports at loading.

    Files may hold a layer more than the model. It is accepted as a multi-token-prediction head if the config
    mentions one, or if it has tensors that no layer has. Otherwise the config leaves out a layer.

    Args:
        model: the loaded model.
        info: what ``from_pretrained`` returns with ``output_loading_info``.
        name: Hub id or directory, for the message.

    Raises:
        ConfigError: weights are missing, layers are left over, or the directory is an adapter.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ConfigError(f"model: '{name}' holds an adapter. Merge it into its model, and give the result.")
    path, layers = decoder_layers(model)
    count, at = len(layers), re.compile(re.escape(path) + r"\.(\d+)\.(.+)")

    def by_layer(keys: Iterable[str]) -> dict[int, set[str]]:
        """Return the names of weights by layer; those outside the layers are under -1."""
        names: dict[int, set[str]] = {}
        for key in keys:
            index, within = match.groups() if (match := at.match(key)) else ("-1", key)
            names.setdefault(int(index), set()).add(within)
        return names

    own = by_layer(model.state_dict())
    if missing := by_layer(info["missing_keys"]):
        first = min(missing)
        if first > 0 and missing == {i: names for i, names in own.items() if i >= first}:
            raise ConfigError(_depth(name, count, first))
        keys = sorted(info["missing_keys"])
        raise ConfigError(f"model: '{name}' lacks {len(keys)} weights, such as '{keys[0]}'.")
    ordinary = set().union(*(names for i, names in own.items() if i >= 0))
    beyond = {i: names for i, names in by_layer(info["unexpected_keys"]).items() if i >= count}
    surplus = [i for i, names in beyond.items() if names <= ordinary]
    if len(surplus) > extra_layers(model.config):
        raise ConfigError(_depth(name, count, max(surplus) + 1))


def _depth(name: str, claimed: int, held: int) -> str:
    return (
        f"model: the config.json of '{name}' says {claimed} layers (num_hidden_layers), and its weights hold "
        f"{held}. Set it, and what else is listed by layer, to the model that the weights are of."
    )


def is_tied(model: PreTrainedModel) -> bool:
    """Return whether input and output embeddings are one tensor."""
    outputs: nn.Module | None = model.get_output_embeddings()
    if outputs is None:
        return False
    read = model.get_input_embeddings().get_parameter("weight")
    return outputs.get_parameter("weight").data_ptr() == read.data_ptr()


def untie(model: PreTrainedModel) -> bool:
    """Set ``tie_word_embeddings`` to false if the loaded model has an output head with weights of its own.

    transformers ties by this flag alone whenever it builds a model, so a copy would lose the head.

    Returns:
        Whether the flag was true, and wrong.
    """
    if not getattr(model.config, "tie_word_embeddings", False) or is_tied(model):
        return False
    if model.get_output_embeddings() is None:
        return False
    for config in (model.config, text_config(model.config)):
        config.tie_word_embeddings = False
    return True


def cause(error: Exception) -> str:
    """Return the first line, at most 300 characters, of the message of an error that a library raised.

    The name of its type precedes it, except for OSError, ValueError and RuntimeError, whose messages say
    enough if there is one.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = (lines or [""])[0][:300]
    kind = type(error).__name__
    return text if isinstance(error, OSError | ValueError | RuntimeError) and text else f"{kind}: {text}"


def blamed(section: dict[str, Any], message: str) -> str:
    """Find the settings of a config whose value (a string) an error message mentions.

    Args:
        section: a config as a dict.
        message: text of the error.

    Returns:
        Words to put in front of it, such as ``its config.json has hidden_act: 'swoosh'. ``; empty if it
        mentions no value.
    """
    guilty = [
        f"{key}: {value!r}"
        for key, value in _words(section)
        if re.search(rf"\b{re.escape(value)}\b", message)
    ]
    return f"its config.json has {', '.join(guilty)}. " if guilty else ""


def _words(section: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the text values of a config with their keys, except those that any error may repeat."""
    texts: list[tuple[str, str]] = []
    for key, value in section.items():
        if isinstance(value, dict):
            texts += _words(value)
        elif isinstance(value, str) and key not in ("dtype", "_name_or_path", "transformers_version"):
            texts.append((key, value))
    return texts
