"""Find the decoder layers of any Hugging Face causal language model, and its stream in their arguments."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import Cache, PretrainedConfig, PreTrainedModel

from src.errors import ConfigError
from src.models.cut_rules import LAYER_COUNTS

Named = tuple[str, nn.ModuleList]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""What a module is called with: positional arguments, and arguments by name."""


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the part of a config that describes the text decoder (the config itself when not nested)."""
    return config.get_text_config(decoder=True)


def num_layers(config: PretrainedConfig) -> int:
    """Return the number of decoder layers of the text model, under whatever name the family uses.

    Raises:
        ConfigError: the config names no layer count, or one below 1.
    """
    text = text_config(config)
    count = getattr(text, "num_hidden_layers", None)
    if isinstance(getattr(type(text), "num_hidden_layers", None), property):  # derived: LongCat counts twice
        stored = text.to_dict()
        count = next((stored[name] for name in LAYER_COUNTS[1:] if name in stored), count)
    if not isinstance(count, int):
        raise ConfigError(f"model: the config of a '{config.model_type}' states no number of layers.")
    if count < 1:
        raise ConfigError(
            f"model: num_hidden_layers is {count} in the config of this '{config.model_type}'; accepted: "
            f"1 or more. Set it to the number of layers that the weights hold."
        )
    return count


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the dotted path of the ``ModuleList`` that holds the decoder layers, and the list.

    It is the outermost list of the config's length; lists inside it (experts, say) do not count. Where a
    tower of another modality is as deep, it is the list nearest to what the model calls its decoder.

    Raises:
        ConfigError: no list, or several, fit; the message names the candidates.
    """
    count = num_layers(model.config)
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    outer = [(n, m) for n, m in lists if not any(n.startswith(o + ".") for o, _ in lists if o != n)]
    fits = [(name, m) for name, m in outer if len(m) == count]
    if len(fits) > 1:
        fits = _nearest(model, fits)
    if len(fits) != 1:
        candidates = [f"{name} ({len(m)})" for name, m in fits or outer]
        raise ConfigError(
            f"model: a '{model.config.model_type}' with {count} layers should hold one list of "
            f"{count} layers; found {', '.join(candidates) or 'none'}."
        )
    return fits[0]


def _nearest(model: PreTrainedModel, lists: list[Named]) -> list[Named]:
    """Return the lists with weights that lie the fewest steps inside the model's decoder."""
    decoder = model.get_decoder()
    inside = {id(module) for module in decoder.modules()}
    own = [(n, m) for n, m in lists if id(m) in inside and any(True for _ in m.parameters())]
    depth = min((n.count(".") for n, _ in own), default=0)
    return [(n, m) for n, m in own if n.count(".") == depth] or lists


def decoder(model: PreTrainedModel) -> nn.Module:
    """Return the module that turns tokens into hidden states, without the output head."""
    module: nn.Module = model.get_decoder()
    if module is model:  # Llama-4 names a prefix that it does not have: take the layers' owner
        module = model.get_submodule(decoder_layers(model)[0].rpartition(".")[0])
    return module


def first(out: Any) -> Tensor:
    """Return the hidden states ``[B, T, H]`` of a module's output: the output itself or its first element."""
    hidden: Tensor = out if isinstance(out, Tensor) else out[0]
    return hidden


def alone(out: Any) -> bool:
    """Return whether a module's output holds the hidden states and no other tensor."""
    return isinstance(out, Tensor) or all(other is None for other in out[1:])


def stream_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden states ``[B, T, H]`` in the arguments that a layer is called with."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def fills_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a layer is given a cache to fill, by whatever place or name."""
    return any(isinstance(value, Cache) for value in (*args, *kwargs.values()))


def with_stream(hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Return the arguments that a layer is called with, their hidden states replaced by ``hidden``."""
    return ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})


def with_first(out: Any, hidden: Tensor) -> Any:
    """Return a module's output, the hidden states in it replaced by ``hidden``."""
    return hidden if isinstance(out, Tensor) else type(out)((hidden, *out[1:]))
