"""Remove units from any Hugging Face decoder: make a new model that computes what the masked one does.

The cut model is built by its own class from a cut config, so ``layer_idx`` and everything a layer derives
from it are right by construction. It receives the parent's weights under their new names. Then each layer is
compared with its original: modules, shapes and plain attributes. Whatever differs is computed from the
position in a way that the config cannot say; the mask is refused, and the error names the difference.

A search learns what a family cannot express before it draws a mask (:mod:`src.models.constraints`).
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from src.errors import ConfigError
from src.mask import Mask
from src.models.constraints import constraints
from src.models.cut_config import kept_config, layer_list, weightless
from src.models.layers import decoder_layers, num_layers
from src.models.positions import guard
from src.models.structure import Sources, structural_changes
from src.units.halves import find_halves
from src.units.narrower import fault
from src.units.width import find_width
from src.units.width_gates import tried_width

T = TypeVar("T")


def cut_config(config: PretrainedConfig, mask: Mask) -> PretrainedConfig:
    """Return the config of the cut model, the smaller model that keeps the units of a mask.

    Raises:
        ConfigError: the mask is of a model of another depth or width, or the family forbids the result.
    """
    mask.check(num_layers(config), config._name_or_path or config.model_type)
    if not mask.wide:
        return kept_config(config, mask.attention, mask.feed_forward)
    width = find_width(config, mask.unit)
    width.check(mask)
    return width.counted.config(config, len(mask.by_layer[0]))


def cut(model: PreTrainedModel, mask: Mask) -> PreTrainedModel:
    """Return the cut model: a new model of the units that a mask keeps, with copies of their weights.

    What lies outside the layers is copied too. Device, weight types, attention implementation, generation
    settings, and train or eval mode are those of ``model``, which stays as it is.

    Raises:
        ConfigError: the mask is of a model of another shape, its weights are quantised, or the family cannot
            express the mask; the message says why.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        raise ConfigError("model: quantised weights cannot be cut; load the parent without quantisation.")
    config = cut_config(model.config, mask)
    with no_init_weights():
        new = type(model)._from_config(config, dtype=model.dtype)
    state = narrowed(model, new, mask) if mask.wide else shortened(model, new, mask)
    try:
        new.load_state_dict(state, assign=True)
    except RuntimeError as e:
        raise ConfigError(f"keep: this '{config.model_type}' holds tensors that no rule cuts: {e}") from e
    new.tie_weights()
    if model.can_generate():
        new.generation_config = copy.deepcopy(model.generation_config)
    new = guard(new.to(model.device).train(model.training))
    if mask.wide and (why := fault(new)):
        raise ConfigError(f"keep: a '{config.model_type}' does not run without {mask.missing}: {why}")
    return new


def shortened(model: PreTrainedModel, new: PreTrainedModel, mask: Mask) -> dict[str, Tensor]:
    """Return the state dict of a model with fewer layers or halves: copies of the weights that stay.

    Args:
        model: the parent.
        new: the cut model, its weights not set.
        mask: of layers or halves.

    Raises:
        ConfigError: a layer of the new model is built otherwise than the one it comes from.
    """
    path, layers = decoder_layers(model)
    origins = sources(model, mask)
    # Some layers change when they run (BigBird's attention), so a fresh parent is compared with a fresh cut.
    fresh = layer_list(weightless(model.config, type(model)), path)
    if misfits := structural_changes(fresh, layer_list(new, path), origins):
        limit = constraints(model.config).reason
        raise ConfigError(f"keep: {next(iter(misfits.values()))} {limit}")
    shapes = {name: tensor.shape for name, tensor in new.state_dict().items()}
    state = renamed(model.state_dict(), path, origins)
    return {name: _along_depth(x, shapes.get(name, x.shape), len(layers), mask) for name, x in state.items()}


def narrowed(model: PreTrainedModel, new: PreTrainedModel, mask: Mask) -> dict[str, Tensor]:
    """Return the state dict of a model with narrower layers: copies of the weights that stay.

    Args:
        model: the parent.
        new: the cut model, its weights not set.
        mask: of KV groups or channels.

    Raises:
        ConfigError: a layer of the new model is built otherwise than the one it comes from.
    """
    path, _ = decoder_layers(model)
    width = tried_width(model, mask.unit)
    fresh = layer_list(weightless(model.config, type(model)), path)
    shares = len(mask.by_layer[0]), width.count
    if misfits := structural_changes(fresh, layer_list(new, path), sources(model, mask), shares):
        raise ConfigError(f"keep: {next(iter(misfits.values()))}")
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for index, (blocks, kept) in enumerate(zip(width.blocks, mask.by_layer, strict=True)):
        for name, block in blocks.items():
            if (full := f"{path}.{index}.{name}") in state:
                state[full] = block.keep(state[full], kept)
    return state


def sources(model: PreTrainedModel, mask: Mask) -> Sources:
    """Return which layer of the parent each layer of the cut model takes its attention and feed-forward from.

    Raises:
        ConfigError: the mask recombines halves, and the layers do not consist of two.
    """
    return Sources(mask.attention, mask.feed_forward, find_halves(model) if mask.recombines else ())


def renamed(state: dict[str, T], path: str, sources: Sources) -> dict[str, T]:
    """Return the parent's weights that a cut of layers or halves keeps, under their names in the cut model.

    Weights of removed units are left out, those outside the layers keep their names; no tensor is copied.

    Args:
        state: state dict of the parent, or of adapters on it; or anything else by these names.
        path: name of the parent's list of layers, such as ``model.layers``.
        sources: which layer of the parent each new layer comes from.
    """
    out = {}
    for name, tensor in state.items():
        if not name.startswith(path + "."):
            out[name] = tensor
            continue
        index, _, rest = name.removeprefix(path + ".").partition(".")
        for position in sources.positions(int(index), rest):
            out[f"{path}.{position}.{rest}"] = tensor
    return out


def kept_weights(state: dict[str, T], parent: PreTrainedModel, mask: Mask) -> dict[str, T]:
    """Return :func:`renamed` entries of a state dict of ``parent``, for the cut by ``mask``.

    Raises:
        ConfigError: as of :func:`sources`.
    """
    return renamed(state, decoder_layers(parent)[0], sources(parent, mask))


def _along_depth(tensor: Tensor, shape: torch.Size, length: int, mask: Mask) -> Tensor:
    """Return a copy of a tensor; if one axis holds all layers, with the entries of the kept layers alone.

    Args:
        tensor: of the parent.
        shape: that the cut model gives it.
        length: number of layers of the parent.
        mask: of layers or halves.

    Raises:
        ConfigError: the tensor holds all layers, and the mask recombines halves.
    """
    axes = [a for a, (old, new) in enumerate(zip(tensor.shape, shape, strict=False)) if old != new]
    keep = mask.attention
    if len(axes) == 1 and tensor.shape[axes[0]] * len(keep) == shape[axes[0]] * length:
        if mask.recombines:
            raise ConfigError(
                f"keep: '{mask.model}' holds one tensor for all layers, outside of them, which cannot follow "
                f"attention and feed-forward apart. Use whole layers (unit: layer)."
            )
        axis = axes[0]
        blocks = tensor.unflatten(axis, (length, -1))
        kept: Tensor = blocks.index_select(axis, torch.tensor(keep, device=tensor.device))
        return kept.flatten(axis, axis + 1)
    return tensor.detach().clone()
