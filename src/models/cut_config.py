"""Make the config of a cut model, and models from a config without weights.

A config says everything about a model but its weights, so a cut is first a cut of the config: lists, counts
and periods follow the kept layers (:mod:`src.models.cut_rules`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from src.errors import ConfigError
from src.models.claims import blamed, cause
from src.models.cut_rules import Section, attention_layers, forbidden, lenders, slice_section
from src.models.layers import num_layers, text_config


def kept_config(
    config: PretrainedConfig, keep: Sequence[int], feed_forward: Sequence[int] | None = None
) -> PretrainedConfig:
    """Return the config of a model with some of the parent's layers.

    Args:
        config: of the parent.
        keep: layers that stay, rising.
        feed_forward: layers whose feed-forwards stay, if a recombined cut takes them from others than
            ``keep``.

    Raises:
        ConfigError: the family forbids it; the message names the layer that must stay, or the setting.
    """
    length = num_layers(config)
    if why := forbidden(config):
        raise ConfigError(f"keep: this '{config.model_type}' {why}.")
    attend = attention_layers(config)
    if attend and not attend & set(keep):
        raise ConfigError(
            f"keep: no attention layer is left, and the cache of a '{config.model_type}' counts tokens in "
            f"one. Keep at least one of {sorted(attend)}."
        )
    for lender, borrowers in lenders(config).items():
        if lender not in keep and borrowers & set(keep):
            raise ConfigError(
                f"keep: layer {lender} is removed, but layers {sorted(borrowers & set(keep))} of this "
                f"'{config.model_type}' use its keys, values, indices or position. Keep layer {lender} too."
            )
    sliced = slice_section(text_section(config), length, keep, feed_forward)
    new = rebuilt(config, sliced)
    read = text_section(new)
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        if name in sliced and read.get(name) != sliced[name]:
            raise ConfigError(
                f"keep: the config class of a '{config.model_type}' turns {name} {sliced[name]} into "
                f"{read.get(name)}, which is not what the kept layers are."
            )
    return new


def text_section(config: PretrainedConfig) -> Section:
    """Return the settings of the text decoder as stored: all of a plain config, a part of a nested one."""
    section: Section = config.to_dict()
    for key in _text_path(config):
        section = section[key]
    return section


def rebuilt(config: PretrainedConfig, section: Section) -> PretrainedConfig:
    """Return a config whose text decoder has the settings ``section``; all else is that of ``config``.

    Args:
        config: the original.
        section: settings of the text decoder, as :func:`text_section` returns them.

    Raises:
        ConfigError: the config class does not accept the section.
    """
    whole = config.to_dict()
    whole.pop("quantization_config", None)
    place = whole
    for key in _text_path(config):
        place = place[key]
    place.clear()
    place.update(section)
    place.pop("quantization_config", None)
    try:
        new = type(config).from_dict(copy.deepcopy(whole))
    except Exception as e:  # classes are foreign, and may raise anything
        why = " ".join(str(e).split())
        raise ConfigError(f"keep: a '{config.model_type}' config cannot hold this mask: {why}") from e
    new._attn_implementation = attention_implementation(config)
    new._experts_implementation = config._experts_implementation
    new._name_or_path = config._name_or_path
    return new


def weightless(config: PretrainedConfig, family: type[PreTrainedModel] | None = None) -> PreTrainedModel:
    """Build a model of a config on the meta device, where tensors have shapes and no data.

    Args:
        config: of the model.
        family: its class; None is the one that ``AutoModelForCausalLM`` takes.

    Raises:
        ConfigError: the class cannot be built from the config.
    """
    config = copy.deepcopy(config)
    try:
        with torch.device("meta"), no_init_weights():
            made: PreTrainedModel
            if family is not None:
                made = family._from_config(config)
            else:
                made = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            return made
    except Exception as e:  # classes are foreign, and may raise anything
        raise ConfigError(
            f"model: AutoModelForCausalLM cannot build a '{config.model_type}' from its own config, so an "
            f"export could not be loaded: {blamed(config.to_dict(), str(e))}{cause(e)}"
        ) from e


def layer_list(model: PreTrainedModel, path: str) -> nn.ModuleList:
    """Return the layers of a model, which lie at the dotted ``path``.

    Args:
        model: any decoder.
        path: as :func:`src.models.layers.decoder_layers` finds it in a model of the same class.
    """
    found = model.get_submodule(path)
    assert isinstance(found, nn.ModuleList)
    return found


def attention_implementation(config: PretrainedConfig) -> dict[str, str | None]:
    """Return which attention implementation (``sdpa``, ...) a config sets, as transformers' setter takes it.

    Returns:
        That of the config itself under ``""``, and that of each nested config under its key.
    """
    parts = {key: getattr(config, key, None) for key in config.sub_configs}
    named = {key: part._attn_implementation for key, part in parts.items() if part is not None}
    return {"": config._attn_implementation, **named}


def _text_path(config: PretrainedConfig) -> tuple[str, ...]:
    """Return the keys that lead to the text decoder's part of a nested config; empty if it is not nested."""
    text = text_config(config)
    for key in config.sub_configs:
        if getattr(config, key) is text:
            return (key,)
    return ()
