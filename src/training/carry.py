"""Carry the state of an optimiser through a cut of the model that it trains."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from src.errors import ConfigError
from src.mask import Mask
from src.models.cut import renamed, sources
from src.models.layers import decoder_layers
from src.units.width import find_width

State = dict[str, Any]
WEIGHT = "the weight itself"


def carry(optimizer: Optimizer, old: PreTrainedModel, new: PreTrainedModel, mask: Mask) -> None:
    """Let an optimiser train the cut of a model: of what survives it keeps all that it has gathered.

    Layers and halves that stay keep their state as it is. Where parts of a weight go, the same parts of what
    has its shape go, such as Adam's moments; counts of steps stay.

    Args:
        optimizer: trains all weights of ``old``, in one group; those of ``new`` take their place.
        old: the model before the cut, its weights as they were cut.
        new: the cut model.
        mask: of that cut.

    Raises:
        ConfigError: the model holds one tensor for all layers; or the optimiser has gathered something of
            another shape than the weight's, of which the part that stays is not known.
    """
    states: dict[str, State] = {
        name: {**optimizer.state.get(weight, {}), WEIGHT: weight} for name, weight in old.named_parameters()
    }
    path, _ = decoder_layers(old)
    kept = narrowed(states, path, old, mask) if mask.wide else renamed(states, path, sources(old, mask))
    optimizer.state.clear()
    weights = []
    for name, weight in new.named_parameters():
        state = kept[name]
        if state.pop(WEIGHT).shape != weight.shape:
            raise ConfigError(
                f"model.class_path: a '{old.config.model_type}' holds one tensor for all layers ({name}), of "
                f"which a cut has a part, so it cannot shrink while it trains. Use src.recover.Recovery."
            )
        if weight.requires_grad:
            weights.append(weight)
            if state:
                optimizer.state[weight] = state
    (group,) = optimizer.param_groups
    group["params"] = weights


def narrowed(states: dict[str, State], path: str, old: PreTrainedModel, mask: Mask) -> dict[str, State]:
    """Return the states of a model's weights, by name, cut as the weights are by a mask of width."""
    width, out = find_width(old.config, mask.unit, type(old)), dict(states)
    for index, (blocks, units) in enumerate(zip(width.blocks, mask.by_layer, strict=True)):
        for inner, block in blocks.items():
            name = f"{path}.{index}.{inner}"
            if name not in states:  # a buffer
                continue
            weight = states[name][WEIGHT]
            tensors = {key: x for key, x in states[name].items() if isinstance(x, Tensor) and x.numel() > 1}
            if other := [key for key, x in tensors.items() if x.shape != weight.shape]:
                raise ConfigError(
                    f"model.optimizer: it keeps {', '.join(other)} of another shape than the weights, which "
                    f"cannot be cut with them. Use torch.optim.AdamW, or model.unit layer."
                )
            out[name] = states[name] | {key: block.keep(x, units) for key, x in tensors.items()}
    return out
