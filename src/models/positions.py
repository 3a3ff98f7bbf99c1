"""Refuse sequences longer than a model's table of positions.

Rotary positions have no end. A table of positions, learned (GPT-2, OPT) or computed once (GPT-J, CTRL), has
one. Beyond it, a CPU raises an ``IndexError``, and a GPU an assertion that ends the process. The table is
found by its place and size, not by a family's names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from src.errors import ConfigError
from src.models.layers import decoder, decoder_layers, text_config

SPARE = 8
"""Most entries that a table may have beyond the positions: for an offset (OPT), or for padding."""


def positions_of(config: PretrainedConfig) -> int | None:
    """Return how many positions a config states; None if it states no number, or says none by one below 1."""
    stated = getattr(text_config(config), "max_position_embeddings", None)
    return stated if isinstance(stated, int) and stated > 0 else None


def position_limit(model: PreTrainedModel) -> int | None:
    """Return the most tokens that a sequence may have; None where positions have no end.

    The table has an entry for each of the config's positions. In some families one entry is for padding, and
    tokens use only those behind it (RoBERTa), so fewer fit.
    """
    if (positions := positions_of(model.config)) is None:
        return None
    sizes = ((size, lost) for size, lost in _tables(model) if positions <= size <= positions + SPARE)
    return min((min(positions, size - lost) for size, lost in sizes), default=None)


def _tables(model: PreTrainedModel) -> Iterator[tuple[int, int]]:
    """Yield each possible table of positions: its number of entries, and how many precede the first token."""
    words = model.get_input_embeddings()
    for module in decoder(model).modules():
        if isinstance(module, nn.Embedding) and module is not words:
            yield module.num_embeddings, 0 if module.padding_idx is None else module.padding_idx + 1
    own = decoder(model).buffers(recurse=False)  # a table in a module of its own may grow (XGLM)
    for buffer in (*own, *decoder_layers(model)[1].buffers()):
        if buffer.ndim == 2:
            yield len(buffer), 0


def guard(model: PreTrainedModel) -> PreTrainedModel:
    """Make a model refuse sequences longer than its table of positions; return the model.

    A hook on the decoder checks the length before each forward pass, and raises a :class:`ConfigError`.
    """
    limit, family = position_limit(model), model.config.model_type
    if limit is None:
        return model

    def check(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        tokens: Tensor = next(tensor for tensor in inputs if tensor is not None)
        cache, positions_BT = kwargs.get("past_key_values"), kwargs.get("position_ids")
        length = tokens.shape[1] + (cache.get_seq_length() if cache is not None else 0)
        if length > limit and positions_BT is not None:  # packed rows begin anew, padded ones later
            length = int(positions_BT.max()) + 1
        if length > limit:
            raise too_long(f"a row has {length} tokens", family, limit)

    decoder(model).register_forward_pre_hook(check, with_kwargs=True)
    return model


def too_long(excess: str, family: str, limit: int) -> ConfigError:
    """Return the error for a sequence longer than a table of positions.

    Args:
        excess: what is too long, and its length, such as ``a row has 2048 tokens``.
        family: model type, for the message.
        limit: entries of the table.
    """
    return ConfigError(
        f"{excess}, and the position table of this '{family}' ends at {limit}. Lower the length: "
        f"data.max_length of a run; --max-length, --max-new-tokens, --prompt-tokens or --proof-tokens."
    )
