"""Find the units of width in decoder layers, KV groups and channels, without knowing a family.

A number in the config counts the units of a layer. Made smaller, it makes some tensors narrower: columns of
the linear map that writes to the residual stream (the *writer*), and rows of those that feed it. So which
tensors hold the units, and how many rows each unit has, is read off two models without weights. Two things
are tried on the real layers (:mod:`src.units.width_gates`): that the rows are in the order of the units, and
that they reach the stream only through the writer's columns of their own unit.

Shapes: B batch, T tokens, W units in each layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from src.errors import ConfigError
from src.mask import WIDE, Mask, Unit
from src.models.cut_config import rebuilt, text_section, weightless
from src.models.layers import decoder_layers, text_config
from src.models.structure import Misfit

INPUT = {nn.Linear: 1, Conv1D: 0}
"""Axis of the input in the weight of each kind of linear map."""


@dataclass(frozen=True)
class Counted:
    """The settings of a config that count the units of width in a layer.

    Attributes:
        each: for each key, how much of its value one unit accounts for.
        fixed: settings to spell out because the family would otherwise derive them from the counts.
    """

    each: Mapping[str, int]
    fixed: Mapping[str, int]

    def config(self, config: PretrainedConfig, count: int) -> PretrainedConfig:
        """Return the config of a model with ``count`` units in each layer.

        Raises:
            ConfigError: the config class does not accept it.
        """
        counts = {key: each * count for key, each in self.each.items()}
        return rebuilt(config, {**text_section(config), **self.fixed, **counts})

    def refusal(self, config: PretrainedConfig, count: int) -> str:
        """Return why the config class does not accept ``count`` units in each layer; empty if it does."""
        try:
            self.config(config, count)
        except ConfigError as e:
            return str(e).partition(": ")[2]
        return ""


@dataclass(frozen=True)
class Block:
    """Where a tensor holds units of width: ``each`` entries along ``axis`` for each unit, in order."""

    axis: int
    each: int

    def keep(self, tensor: Tensor, units: Sequence[int]) -> Tensor:
        """Return a copy of a tensor that holds the entries of some units alone."""
        kept = torch.tensor(units, device=tensor.device)
        entries = (kept[:, None] * self.each + torch.arange(self.each, device=tensor.device)).flatten()
        return tensor.detach().index_select(self.axis, entries)

    def count(self, tensor: Tensor) -> int:
        """Return the number of units that a tensor holds."""
        return tensor.shape[self.axis] // self.each

    def sums(self, tensor: Tensor) -> Tensor:
        """Return the sum ``[W]`` of a tensor over the entries of each unit."""
        return tensor.movedim(self.axis, 0).reshape(self.count(tensor), -1).sum(1)


@dataclass(frozen=True)
class Width:
    """Where the units of width (KV groups or channels) lie in a model.

    Attributes:
        unit: kind of the units.
        count: number of units in each layer, W.
        counted: the settings of the config that count them.
        writers: for each layer, the path of the linear map that takes the units as input and writes to the
            residual stream.
        blocks: for each layer, by name of a tensor inside it, where that tensor holds the units.
    """

    unit: Unit
    count: int
    counted: Counted
    writers: tuple[str, ...]
    blocks: tuple[dict[str, Block], ...]

    def check(self, mask: Mask) -> None:
        """Refuse a mask that was made for another number of units in each layer.

        Raises:
            ConfigError: the numbers differ; the message names both.
        """
        if mask.width != self.count:
            raise ConfigError(
                f"mask: it was made for {mask.width} {WIDE[self.unit]} in each layer, but this model has "
                f"{self.count}. Give the mask of this model, or change the model."
            )


def find_width(config: PretrainedConfig, unit: Unit, family: type[PreTrainedModel] | None = None) -> Width:
    """Return where the units of width lie in a model, read off models without weights.

    Each setting of the config is tried as their count. Of those that change nothing outside of the layers,
    the one that changes most weights is taken.

    Args:
        config: of the model.
        unit: kind of the units.
        family: class of the model; None is the one that ``AutoModelForCausalLM`` takes.

    Raises:
        Misfit: the layers do not hold such units in a way that can be cut; the message gives the reason.
    """
    parent = weightless(config, family)
    path, layers = decoder_layers(parent)
    tensors, found, by = _tensors(parent), dict[str, Block](), None
    for counted in (_heads if unit == "kv_group" else _numbers)(config, layers):
        try:
            blocks = _narrower(tensors, _tensors(weightless(counted.config(config, 1), family)), path)
        except ConfigError:  # the class accepts no such number
            continue
        if sum(tensors[name].numel() for name in blocks) > sum(tensors[name].numel() for name in found):
            found, by = blocks, counted
    if by is None:
        raise Misfit(
            f"unit: no setting of a '{config.model_type}' config makes its layers narrower by {WIDE[unit]} "
            f"and changes nothing else, so these cannot go alone. Use unit: layer."
        )
    held = [
        {name.removeprefix(f"{path}.{index}."): block for name, block in found.items()
         if name.startswith(f"{path}.{index}.")}
        for index in range(len(layers))
    ]  # fmt: skip
    writers = []
    for index, (layer, blocks) in enumerate(zip(layers, held, strict=True)):
        with misfit_of(config, index, layer, unit):
            writers.append(_writer(layer, blocks, unit))
    counts = {
        blocks[f"{writer}.weight"].count(layer.get_parameter(f"{writer}.weight"))
        for layer, writer, blocks in zip(layers, writers, held, strict=True)
    }
    if len(counts) > 1:
        raise Misfit(
            f"unit: the layers of this '{config.model_type}' differ in their number of {WIDE[unit]} "
            f"({', '.join(map(str, sorted(counts)))}), and a mask removes as many from each. Use unit: layer."
        )
    return Width(unit, counts.pop(), by, tuple(writers), tuple(held))


@contextmanager
def misfit_of(config: PretrainedConfig, index: int, layer: nn.Module, unit: Unit) -> Iterator[None]:
    """Complete, in the block, the text of a :class:`Misfit` that says only what the layer does.

    Args:
        config: of the model.
        index: number of the layer.
        layer: the layer.
        unit: the kind of unit that it does not hold.
    """
    try:
        yield
    except Misfit as e:
        raise Misfit(
            f"unit: layer {index} of this '{config.model_type}' ({type(layer).__name__}) {e}, so its "
            f"{WIDE[unit]} cannot go alone. Use unit: layer."
        ) from e


def feed_forward_writers(config: PretrainedConfig) -> tuple[str, ...]:
    """Return, for each layer, the path of the linear map by which its feed-forward writes to the stream.

    Raises:
        ConfigError: the layers have no such map whose inputs are the channels of one feed-forward.
    """
    try:
        return find_width(config, "channel").writers
    except Misfit as e:
        raise ConfigError(
            f"terms: activations of feed-forwards cannot be read in a '{config.model_type}', of which a "
            f"layer {e.__cause__ or 'has no channels that its config counts'}. Leave out the term that does."
        ) from e


def _numbers(config: PretrainedConfig, layers: nn.ModuleList) -> Iterator[Counted]:
    """Yield each number of the config that divides a size in a layer, and each key that it leaves unset."""
    sizes = {size for tensor in layers.state_dict().values() for size in tensor.shape}
    for key, value in text_section(config).items():
        fits = type(value) is int and value > 1 and any(size % value == 0 for size in sizes)
        if value is None or fits:
            yield Counted({key: 1}, {})


def _heads(config: PretrainedConfig, _: nn.ModuleList) -> Iterator[Counted]:
    """Yield the settings that count KV heads, each with its query heads; the width of a head stays."""
    text = text_config(config)
    heads = getattr(text, "num_attention_heads", None)
    groups = getattr(text, "num_key_value_heads", None) or heads
    if type(heads) is not int or type(groups) is not int or heads % groups:
        return
    if "reuse" in (getattr(text, "kv_sharing_modes", None) or ()):
        raise Misfit(
            f"unit: some layers of this '{config.model_type}' read keys and values of others, whose KV "
            f"groups would have to go with theirs. Use unit: layer."
        )
    if groups == 1:
        raise Misfit(f"unit: a layer of this '{config.model_type}' has one KV head, and one has to stay.")
    named = {"num_attention_heads": heads // groups, "num_key_value_heads": 1}
    each = {text.attribute_map.get(key, key): value for key, value in named.items() if hasattr(text, key)}
    # Read as it is stored: where layers differ in it, the attribute cannot be read.
    stored = text_section(config).get(text.attribute_map.get("head_dim", "head_dim"))
    head = stored or text.hidden_size // heads
    yield Counted(each, {})
    yield Counted(each, {text.attribute_map.get("head_dim", "head_dim"): head})


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    parameters = model.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(model.named_buffers(remove_duplicate=False))}


def _narrower(old: dict[str, Tensor], new: dict[str, Tensor], path: str) -> dict[str, Block]:
    """Return where tensors hold the units, by comparing with a model of one unit; empty if others change too.

    Args:
        old: tensors of the model by name.
        new: those of the same model with one unit in each layer.
        path: of the list of layers.
    """
    if old.keys() != new.keys():
        return {}
    blocks = {}
    for name, before in old.items():
        pairs = list(zip(before.shape, new[name].shape, strict=False))
        axes = [axis for axis, (size, one) in enumerate(pairs) if size != one]
        if not axes and before.ndim == new[name].ndim:
            continue
        if len(axes) != 1 or before.ndim != new[name].ndim or not name.startswith(f"{path}."):
            return {}
        size, each = pairs[axes[0]]
        if not each or size % each:
            return {}
        blocks[name] = Block(axes[0], each)
    return blocks


def _writer(layer: nn.Module, blocks: Mapping[str, Block], unit: Unit) -> str:
    """Return the path of the one linear map whose input the units are.

    Raises:
        Misfit: there is none, or several; or other tensors hold the units in a form that cannot be cut.
    """
    if not blocks:
        raise Misfit(f"has no {WIDE[unit]} of the kind that other layers have")
    owners = {name: layer.get_submodule(name.rpartition(".")[0]) for name in blocks}
    writers = [
        name.rpartition(".")[0]
        for name, block in blocks.items()
        if INPUT.get(type(owners[name])) == block.axis and name.endswith("weight")
    ]  # fmt: skip
    if not writers:
        tensors = _tensors(layer)
        name = max(blocks, key=lambda name: tensors[name].numel())
        raise Misfit(f"holds them in '{name}', which is no linear map of its own")
    if len(writers) > 1:
        raise Misfit(f"writes them through several linear maps ({', '.join(writers)})")
    if unit == "channel" and (each := blocks[f"{writers[0]}.weight"].each) > 1:
        raise Misfit(f"takes only multiples of {each} as their number")
    for name, block in blocks.items():
        if unit == "channel" and block.each > 1:
            raise Misfit(f"holds {block.each} rows of '{name}' for each, in projections that are fused")
    return writers[0]
