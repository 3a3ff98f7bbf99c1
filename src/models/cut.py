"""Remove layers from any Hugging Face decoder: a new model, renumbered, that behaves like the masked one.

The cut model is built by its own class from a cut config, so ``layer_idx`` and everything a layer derives
from it are right by construction, and it receives the parent's weights under their new names. Then each
layer is compared with its original: modules, shapes and plain attributes. Whatever differs is computed from
the position in a way that the config cannot say, and the mask is refused by that name.

What a family cannot express is offered to the search before it draws a mask: :func:`constraints`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from src.errors import ConfigError
from src.mask import Mask
from src.models.claims import blamed, cause
from src.models.cut_rules import attention_layers, forbidden, lenders, slice_section
from src.models.layers import decoder_layers, num_layers, text_config
from src.models.positions import guard
from src.models.structure import Sources, alike, structural_changes
from src.units.halves import find_halves


@dataclass(frozen=True)
class Constraints:
    """What a mask must respect so that the family can express the cut model.

    Attributes:
        always_keep: layers that must stay, whatever else goes.
        tail_only: only the last layers may go, because each layer's function depends on its position.
        period: when above 1, layers may also go in whole blocks ``[b * period, (b + 1) * period)``.
        one_of: groups of layers, at least one of each of which must stay.
        reason: why, for a person; empty when every mask is legal.
    """

    always_keep: frozenset[int] = frozenset()
    tail_only: bool = False
    period: int = 1
    one_of: tuple[frozenset[int], ...] = ()
    reason: str = ""

    def pinned(self, length: int, remove: int) -> frozenset[int]:
        """Layers to keep so that any choice of ``remove`` others of ``length`` is legal."""
        pinned = self.always_keep
        if self.tail_only:
            pinned |= frozenset(range(length - remove))
        for group in self.one_of:
            if not group & pinned and len(group) <= remove:
                pinned |= {min(group)}
        return pinned


def cut_config(config: PretrainedConfig, mask: Mask) -> PretrainedConfig:
    """Return the config of the model that keeps the layers of a mask.

    Raises:
        ConfigError: the mask is of a model of another depth, or the family forbids the result.
    """
    mask.check(num_layers(config), config._name_or_path or config.model_type)
    return _cut_config(config, mask.attention, mask.feed_forward)


def _cut_config(
    config: PretrainedConfig, keep: Sequence[int], feed_forward: Sequence[int] | None = None
) -> PretrainedConfig:
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
    whole = config.to_dict()
    whole.pop("quantization_config", None)
    section, path = whole, _text_path(config)
    for key in path:
        section = section[key]
    sliced = slice_section(section, length, keep, feed_forward)
    section.clear()
    section.update(sliced)
    try:
        new = type(config).from_dict(copy.deepcopy(whole))
    except (ValueError, StrictDataclassError) as e:
        why = " ".join(str(e).split())
        raise ConfigError(f"keep: a '{config.model_type}' config cannot hold this mask: {why}") from e
    read = new.to_dict()
    for key in path:
        read = read[key]
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        if name in sliced and read.get(name) != sliced[name]:
            raise ConfigError(
                f"keep: the config class of a '{config.model_type}' turns {name} {sliced[name]} into "
                f"{read.get(name)}, which is not what the kept layers are."
            )
    new._attn_implementation = attention_implementation(config)
    new._experts_implementation = config._experts_implementation
    new._name_or_path = config._name_or_path
    return new


def cut(model: PreTrainedModel, mask: Mask) -> PreTrainedModel:
    """Return a new model with copies of the layers of ``model`` that a mask keeps, and of all around them.

    Device, weight types, attention implementation, generation settings and mode are those of ``model``,
    which stays as it is.

    Raises:
        ConfigError: the mask is of a model of another depth, its weights are quantised, or the family cannot
            express the mask; the message says why.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        raise ConfigError("model: quantised weights cannot be cut; load the parent without quantisation.")
    path, layers = decoder_layers(model)
    config = cut_config(model.config, mask)
    origins = sources(model, mask)
    with no_init_weights():
        new = type(model)._from_config(config, dtype=model.dtype)
    # Some layers change when they run (BigBird's attention), so a fresh parent is compared with a fresh cut.
    fresh = _list(_weightless(model.config, type(model)), path)
    if misfits := structural_changes(fresh, _list(new, path), origins):
        limit = constraints(model.config).reason
        raise ConfigError(f"keep: {next(iter(misfits.values()))} {limit}")
    shapes = {name: tensor.shape for name, tensor in new.state_dict().items()}
    state = {}
    for name, tensor in renamed(model.state_dict(), path, origins).items():
        state[name] = _along_depth(tensor, shapes.get(name, tensor.shape), len(layers), mask)
    try:
        new.load_state_dict(state, assign=True)
    except RuntimeError as e:
        raise ConfigError(f"keep: this '{config.model_type}' holds tensors that no rule cuts: {e}") from e
    new.tie_weights()
    if model.can_generate():
        new.generation_config = copy.deepcopy(model.generation_config)
    return guard(new.to(model.device).train(model.training))


def constraints(config: PretrainedConfig) -> Constraints:
    """Return what a mask of this model must respect, found by cutting weightless copies of the model.

    One layer of each kind, both ends and the whole tail are taken out in turn. Where no kind can go without
    changing another layer, the layers compute with their positions: only the tail can go, or blocks of a
    period, which is looked for.
    """
    length, lent, attend = num_layers(config), lenders(config), attention_layers(config)
    if why := forbidden(config):
        return Constraints(frozenset(range(length)), reason=f"This '{config.model_type}' {why}.")
    path, layers = decoder_layers(_weightless(config))

    def changes(removed: Iterable[int]) -> str:
        keep = [i for i in range(length) if i not in set(removed)]
        try:
            cut_layers = _list(_weightless(_cut_config(config, keep)), path)
        except ConfigError as e:
            return str(e)
        return next(iter(structural_changes(layers, cut_layers, Sources(keep, keep)).values()), "")

    kinds = [kind - lent.keys() - {length - 1} for kind in alike(layers)]
    probes = {min(kind, key=lambda i: abs(i - length // 2)): kind for kind in kinds if kind}
    fixed = {probe: why for probe in probes if (why := changes([probe]))}
    reasons = [f"Layers {sorted(lent)} must stay: others use what they compute."] if lent else []
    if attend:
        reasons.append(f"One or more of the attention layers {sorted(attend)} must stay.")
    if fixed.keys() == probes.keys() and not changes([length - 1]):
        period = next((p for p in range(2, length // 2 + 1) if not changes(range(p, 2 * p))), 1)
        blocks = f", or whole aligned blocks of {period}," if period > 1 else ""
        why = next(iter(fixed.values()))
        reasons.append(f"Only the last layers{blocks} can be removed: {why}")
        return Constraints(frozenset(lent), True, period, (attend,) if attend else (), " ".join(reasons))
    stay = {i: why for probe, why in fixed.items() for i in probes[probe]}
    tail = set(range(length // 2, length)) - lent.keys() - stay.keys()
    for edge, removed in ((0, {0}), (length - 1, {length - 1}), (length - 1, tail)):
        if edge not in stay and (why := changes(removed)):
            stay[edge] = why
    if stay:
        reasons.append(f"Layers {sorted(stay)} must stay: {next(iter(stay.values()))}")
    one_of = [attend] if attend else []
    for kind in _types(config) - {attend}:
        if not kind & ({*lent, *stay} | attend) and (why := changes(kind)):
            one_of.append(kind)
            reasons.append(f"One or more of {sorted(kind)} must stay: {why}")
    return Constraints(frozenset({*lent, *stay}), one_of=tuple(one_of), reason=" ".join(reasons))


def _types(config: PretrainedConfig) -> set[frozenset[int]]:
    """Layers by their type, where the family has several."""
    types = getattr(text_config(config), "layer_types", None) or []
    kinds = {frozenset(i for i, other in enumerate(types) if other == kind) for kind in types}
    return kinds if len(kinds) > 1 else set()


def _weightless(config: PretrainedConfig, family: type[PreTrainedModel] | None = None) -> PreTrainedModel:
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


def _list(model: PreTrainedModel, path: str) -> nn.ModuleList:
    """The layers of a model whose class and path are those of another's."""
    found = model.get_submodule(path)
    assert isinstance(found, nn.ModuleList)
    return found


def attention_implementation(config: PretrainedConfig) -> dict[str, str | None]:
    """How the model attends, ``""`` for the whole and by name for its parts; transformers takes this form."""
    parts = {key: getattr(config, key, None) for key in config.sub_configs}
    named = {key: part._attn_implementation for key, part in parts.items() if part is not None}
    return {"": config._attn_implementation, **named}


def _text_path(config: PretrainedConfig) -> tuple[str, ...]:
    """Keys that lead to the text decoder's part of a nested config."""
    text = text_config(config)
    for key in config.sub_configs:
        if getattr(config, key) is text:
            return (key,)
    return ()


def sources(model: PreTrainedModel, mask: Mask) -> Sources:
    """Where each layer of the cut comes from.

    Raises:
        ConfigError: the mask recombines halves, and the layers do not consist of two.
    """
    return Sources(mask.attention, mask.feed_forward, find_halves(model) if mask.recombines else ())


def renamed(state: dict[str, Tensor], path: str, sources: Sources) -> dict[str, Tensor]:
    """Weights of the kept units under their new numbers, and all weights outside the layers."""
    out = {}
    for name, tensor in state.items():
        if not name.startswith(path + "."):
            out[name] = tensor
            continue
        index, _, rest = name.removeprefix(path + ".").partition(".")
        for position in sources.positions(int(index), rest):
            out[f"{path}.{position}.{rest}"] = tensor
    return out


def _along_depth(tensor: Tensor, shape: torch.Size, length: int, mask: Mask) -> Tensor:
    """A copy of ``tensor``, its one axis that is a multiple of the depth sliced like the layers."""
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
