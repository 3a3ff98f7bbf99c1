"""Try recombined cuts of a family before a search draws them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from transformers import PreTrainedModel

from src.errors import ConfigError
from src.models.constraints import Constraints
from src.models.cut_config import kept_config, layer_list, weightless
from src.models.layers import decoder_layers
from src.models.structure import Misfit, Sources, alike, structural_changes
from src.units.halves import Halves


def try_pairs(model: PreTrainedModel, halves: Sequence[Halves], limits: Constraints) -> None:
    """Refuse a family in which the attention of one kind of layer does not fit the feed-forward of another.

    Wherever a layer of one kind comes before one of another, the attention of the first meets the
    feed-forward of the second, once for each two kinds, in a model without weights.

    Args:
        model: the parent.
        halves: of each of its layers.
        limits: which of its layers stay. Where the last layers alone may go, masks have no choice of pairs.

    Raises:
        Misfit: a pair would be built otherwise than its halves are in the parent; the message names it.
    """
    if limits.tail_only:
        return
    path, _ = decoder_layers(model)
    layers = layer_list(weightless(model.config, type(model)), path)
    kinds = {index: number for number, kind in enumerate(alike(layers)) for index in kind}
    free = [(i, j) for i, j in pairwise(range(len(layers))) if not {i, j} & limits.always_keep]
    unlike = {(kinds[i], kinds[j]): (i, j) for i, j in reversed(free) if kinds[i] != kinds[j]}
    for i, j in unlike.values():
        attention = [index for index in range(len(layers)) if index != j]
        feed_forward = [index for index in range(len(layers)) if index != i]
        try:
            config = kept_config(model.config, attention, feed_forward)
        except ConfigError:  # the config holds no such number of layers of a kind, whatever their halves
            continue
        new = layer_list(weightless(config, type(model)), path)
        if changes := structural_changes(layers, new, Sources(attention, feed_forward, halves)):
            raise Misfit(
                f"unit: the attention of layer {i} of this '{model.config.model_type}' does not fit the "
                f"feed-forward of layer {j}: {next(iter(changes.values()))} Use whole layers (unit: layer)."
            )
