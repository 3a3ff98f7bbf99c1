"""Try a narrower model before anything is loaded: as a class builds it, and as its code runs it."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig, PreTrainedModel

from src.mask import WIDE
from src.models.cut_config import layer_list, weightless
from src.models.layers import decoder_layers
from src.models.structure import Misfit, Sources, structural_changes
from src.units.width import Width


def try_narrower(config: PretrainedConfig, width: Width, kept: int) -> None:
    """Refuse a family whose narrower models are built otherwise than the parent, or do not run.

    Both models have no weights. Where the code needs values to run, as where it sorts tokens by expert, only
    the export tries it.

    Args:
        config: of the parent.
        width: where its KV groups or channels lie.
        kept: how many of them each layer keeps.

    Raises:
        Misfit: a layer would be another function of what it keeps, or the code reads another setting for a
            size; the message says which.
    """
    whole, narrow = (weightless(c).bfloat16().eval() for c in (config, width.counted.config(config, kept)))
    path, layers = decoder_layers(whole)
    same = Sources(range(len(layers)), range(len(layers)))
    changes = structural_changes(layers, layer_list(narrow, path), same, (kept, width.count))
    why = next(iter(changes.values()), "")
    if not why and not fault(whole):
        why = fault(narrow)
    if why:
        raise Misfit(
            f"unit: a '{config.model_type}' does not work with {kept} of {width.count} {WIDE[width.unit]} in "
            f"each layer: {why.removesuffix('.')}. Use unit: layer."
        )


@torch.no_grad()
def fault(model: PreTrainedModel) -> str:
    """Return why a model's own code cannot run it, in a line; empty if it can."""
    try:
        model(input_ids=torch.arange(3, 11, device=model.device)[None])
    except Exception as e:  # whatever a family's own code raises
        return str(e).partition("\n")[0] or type(e).__name__
    return ""
