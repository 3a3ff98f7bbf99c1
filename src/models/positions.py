"""Models whose positions are looked up in a table, which ends.

Rotary positions go on for ever. A table, learned (GPT-2, OPT) or computed once (GPT-J, CTRL), has a last row:
a longer sequence is an ``IndexError`` on a CPU, and on a GPU an assertion that takes the process along.
The table is found by its place and size, not by a family's names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from src.errors import ConfigError
from src.models.layers import decoder, decoder_layers, text_config

SPARE = 8
"""Rows that a table may have beyond the positions: an offset (OPT), a padding row."""


def position_limit(model: PreTrainedModel) -> int | None:
    """Tokens that a sequence may have; None where positions have no end.

    A table has a row for each of the config's positions. Where one row is for padding, tokens count from
    behind it (RoBERTa), and so many are lost.
    """
    positions = getattr(text_config(model.config), "max_position_embeddings", None)
    if not isinstance(positions, int):
        return None
    sizes = ((rows, lost) for rows, lost in _tables(model) if positions <= rows <= positions + SPARE)
    return min((min(positions, rows - lost) for rows, lost in sizes), default=None)


def _tables(model: PreTrainedModel) -> Iterator[tuple[int, int]]:
    """What may be a table of positions: its rows, and how many of them come before the first token's."""
    words = model.get_input_embeddings()
    for module in decoder(model).modules():
        if isinstance(module, nn.Embedding) and module is not words:
            yield module.num_embeddings, 0 if module.padding_idx is None else module.padding_idx + 1
    own = decoder(model).buffers(recurse=False)  # a table in a module of its own may grow (XGLM)
    for buffer in (*own, *decoder_layers(model)[1].buffers()):
        if buffer.ndim == 2:
            yield len(buffer), 0


def guard(model: PreTrainedModel) -> PreTrainedModel:
    """Let a model refuse a sequence beyond its table of positions, in words; returns the model.

    The check is a hook on the decoder, so it is there for whatever runs the model.
    """
    limit, family = position_limit(model), model.config.model_type
    if limit is None:
        return model

    def check(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        fed: Tensor = next(tensor for tensor in given if tensor is not None)
        cache, positions_BT = kwargs.get("past_key_values"), kwargs.get("position_ids")
        length = fed.shape[1] + (cache.get_seq_length() if cache is not None else 0)
        if length > limit and positions_BT is not None:  # packed rows begin anew, padded ones later
            length = int(positions_BT.max()) + 1
        if length > limit:
            raise too_long(f"a row has {length} tokens", family, limit)

    decoder(model).register_forward_pre_hook(check, with_kwargs=True)
    return model


def too_long(found: str, family: str, limit: int) -> ConfigError:
    """The refusal of what is longer than a table of positions; ``found`` says what, and how long."""
    return ConfigError(
        f"{found}, and the position table of this '{family}' ends at {limit}. Lower the length: "
        f"data.max_length of a run; --max-length, --max-new-tokens, --prompt-tokens or --proof-tokens."
    )
