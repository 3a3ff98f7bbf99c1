"""Remove layers from any Hugging Face decoder: a new model, renumbered, that behaves like the masked one.

The cut model is built by its own class from a cut config, so ``layer_idx`` and everything a layer derives
from it are right by construction, and it receives the parent's weights under their new names. Then each
layer is compared with its original: modules, shapes, plain attributes, constant buffers. Whatever differs is
computed from the position in a way that the config cannot say, and the mask is refused by that name.

What a family cannot express is offered to the search before it draws a mask: :func:`constraints`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from src.errors import ConfigError
from src.models.cut_rules import attention_layers, forbidden, lenders, slice_section
from src.models.layers import decoder_layers, num_layers, text_config
from src.models.structure import structural_changes


@dataclass(frozen=True)
class Constraints:
    """What a mask must respect so that the family can express the cut model.

    Attributes:
        always_keep: layers that must stay, whatever else goes.
        tail_only: only the last layers may go, because each layer's function depends on its position.
        period: when above 1, layers may also go in whole blocks ``[b * period, (b + 1) * period)``.
        one_of: at least one of these must stay; empty when nothing is asked.
        reason: why, for a person; empty when every mask is legal.
    """

    always_keep: frozenset[int] = frozenset()
    tail_only: bool = False
    period: int = 1
    one_of: frozenset[int] = frozenset()
    reason: str = ""

    def pinned(self, length: int, remove: int) -> frozenset[int]:
        """Layers to keep so that any choice of ``remove`` others of ``length`` is legal."""
        pinned = self.always_keep
        if self.tail_only:
            pinned |= frozenset(range(length - remove))
        if self.one_of and not self.one_of & pinned and len(self.one_of) <= remove:
            pinned |= {min(self.one_of)}
        return pinned


def cut_config(config: PretrainedConfig, keep: Iterable[int]) -> PretrainedConfig:
    """Return the config of the model that keeps the layers ``keep`` (0-based).

    Raises:
        ConfigError: these are not distinct layers of this model, or the family forbids the result.
    """
    keep, length = sorted(keep), num_layers(config)
    if not keep or len(set(keep)) != len(keep) or not 0 <= keep[0] <= keep[-1] < length:
        raise ConfigError(
            f"keep: {keep} given; accepted: one or more distinct layers within 0..{length - 1} "
            f"(the model has {length} layers)."
        )
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
    whole = config.to_dict()
    whole.pop("quantization_config", None)
    section, path = whole, _text_path(config)
    for key in path:
        section = section[key]
    sliced = slice_section(section, length, keep)
    section.clear()
    section.update(sliced)
    try:
        new = type(config).from_dict(whole, attn_implementation=config._attn_implementation)
    except ValueError as e:
        raise ConfigError(f"keep: a '{config.model_type}' config cannot hold this mask: {e}") from e
    new._experts_implementation = config._experts_implementation
    new._name_or_path = config._name_or_path
    return new


def cut(model: PreTrainedModel, keep: Iterable[int]) -> PreTrainedModel:
    """Return a new model with copies of the layers ``keep`` of ``model`` and of everything around them.

    Device, weight types, attention implementation, generation settings and mode are those of ``model``,
    which stays as it is.

    Raises:
        ConfigError: the layers are not of this model, its weights are quantised, or the family cannot
            express the mask; the message says why.
    """
    keep = sorted(keep)
    if getattr(model.config, "quantization_config", None) is not None:
        raise ConfigError("model: quantised weights cannot be cut; load the parent without quantisation.")
    path, layers = decoder_layers(model)
    config = cut_config(model.config, keep)
    with no_init_weights():
        new = type(model)._from_config(config, dtype=model.dtype)
    misfits = structural_changes(layers, decoder_layers(new)[1], keep)
    if misfits:
        limit = constraints(model.config).reason
        raise ConfigError(f"keep: {next(iter(misfits.values()))} {limit}")
    shapes = {name: tensor.shape for name, tensor in new.state_dict().items()}
    state = {}
    for name, tensor in _renamed(model.state_dict(), path, keep).items():
        state[name] = _along_depth(tensor, shapes.get(name, tensor.shape), len(layers), keep)
    try:
        new.load_state_dict(state, assign=True)
    except RuntimeError as e:
        raise ConfigError(f"keep: this '{config.model_type}' holds tensors that no rule cuts: {e}") from e
    new.tie_weights()
    if model.can_generate():
        new.generation_config = copy.deepcopy(model.generation_config)
    return new.to(model.device).train(model.training)


def constraints(config: PretrainedConfig) -> Constraints:
    """Return what a mask of this model must respect, found by cutting weightless copies of the model.

    Three probes (without a middle, the first and the last layer) tell a layer whose function depends on its
    position from one that does not; if one does, the shortest period that can be taken out is looked for.
    """
    length, lent = num_layers(config), lenders(config)
    if why := forbidden(config):
        return Constraints(frozenset(range(length)), reason=f"This '{config.model_type}' {why}.")
    layers = decoder_layers(_weightless(config))[1]

    def misfits(removed: Iterable[int]) -> dict[int, str]:
        keep = [i for i in range(length) if i not in set(removed)]
        try:
            return structural_changes(layers, decoder_layers(_weightless(cut_config(config, keep)))[1], keep)
        except ConfigError as e:
            return dict.fromkeys(keep, str(e))

    always, reasons, attend = set(lent), [], attention_layers(config)
    if attend:
        reasons.append(f"At least one of the attention layers {sorted(attend)} must stay.")
    if lent:
        reasons.append(f"Layers {sorted(lent)} must stay: other layers use what they compute.")
    free = [i for i in range(1, length - 1) if i not in lent]
    middle = misfits([free[len(free) // 2]]) if free else {}
    if middle:
        tail = not misfits([length - 1])
        always |= set() if tail else set(range(length))
        period = next((p for p in range(2, length // 2 + 1) if not misfits(range(p, 2 * p))), 1)
        blocks = f", or whole aligned blocks of {period}" if period > 1 else ""
        reasons.append(
            f"Only the last layers{blocks} can be removed." if tail else "No layer can be removed."
        )
        return Constraints(frozenset(always), tail, period, attend, " ".join(reasons))
    for edge in {0, length - 1} - always:
        if misfits([edge]):
            always.add(edge)
            reasons.append(f"Layer {edge} must stay: it differs from the others by its position.")
    return Constraints(frozenset(always), one_of=attend, reason=" ".join(reasons))


def _weightless(config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"), no_init_weights():
        return AutoModelForCausalLM.from_config(copy.deepcopy(config))


def _text_path(config: PretrainedConfig) -> tuple[str, ...]:
    """Keys that lead to the text decoder's part of a nested config."""
    text = text_config(config)
    for key in config.sub_configs:
        if getattr(config, key) is text:
            return (key,)
    return ()


def _renamed(state: dict[str, Tensor], path: str, keep: Sequence[int]) -> dict[str, Tensor]:
    """Weights of the kept layers under their new numbers, and all weights outside the layers."""
    new = {str(old): str(position) for position, old in enumerate(keep)}
    out = {}
    for name, tensor in state.items():
        if not name.startswith(path + "."):
            out[name] = tensor
            continue
        index, _, rest = name.removeprefix(path + ".").partition(".")
        if index in new:
            out[f"{path}.{new[index]}.{rest}"] = tensor
    return out


def _along_depth(tensor: Tensor, shape: torch.Size, length: int, keep: Sequence[int]) -> Tensor:
    """A copy of ``tensor``, its one axis that is a multiple of the depth sliced like the layers."""
    axes = [a for a, (old, new) in enumerate(zip(tensor.shape, shape, strict=False)) if old != new]
    if len(axes) == 1 and tensor.shape[axes[0]] * len(keep) == shape[axes[0]] * length:
        axis = axes[0]
        blocks = tensor.unflatten(axis, (length, -1))
        return blocks.index_select(axis, torch.tensor(keep, device=tensor.device)).flatten(axis, axis + 1)
    return tensor.detach().clone()
