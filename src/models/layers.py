"""Find the decoder layers of any Hugging Face causal language model, without knowing its family."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from src.errors import ConfigError


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The part of a config that describes the text decoder (the config itself when not nested)."""
    return config.get_text_config(decoder=True)


def num_layers(config: PretrainedConfig) -> int:
    """Number of decoder layers of the text model, under whatever name the family uses.

    Raises:
        ConfigError: the config names no layer count.
    """
    count = getattr(text_config(config), "num_hidden_layers", None)
    if not isinstance(count, int):
        raise ConfigError(f"model: the config of a '{config.model_type}' states no number of layers.")
    return count


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The dotted path and the one ``ModuleList`` that holds the decoder layers.

    It is the outermost list of the config's length; lists inside it (experts, say) do not count.

    Raises:
        ConfigError: no list, or several, fit; the message names the candidates.
    """
    count = num_layers(model.config)
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    outer = [(n, m) for n, m in lists if not any(n.startswith(o + ".") for o, _ in lists if o != n)]
    fits = [(name, m) for name, m in outer if len(m) == count]
    if len(fits) != 1:
        found = [f"{name} ({len(m)})" for name, m in fits or outer]
        raise ConfigError(
            f"model: a '{model.config.model_type}' with {count} layers should hold one list of "
            f"{count} layers; found {', '.join(found) or 'none'}."
        )
    return fits[0]
