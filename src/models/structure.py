"""Compare the layers of a cut model with their originals in everything but their weights.

A layer of transformers decides what it is when it is built, from the config and its position: attention kind,
window, expert or dense MLP, scale, rotary or none. So two layers that agree in their modules, shapes and
plain attributes compute the same function of the same tensors. A difference shows what the config failed to
carry over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from src.errors import ConfigError

IGNORED = {"layer_idx", "layer_id", "layer_number", "num_hidden_layers", "training", "gradient_checkpointing"}
"""Position and depth themselves, which change as they should (an address in the cache); and running state."""
Plain = bool | int | float | str | None


class Misfit(ConfigError):
    """Says that a model's layers are not built so that units of the asked kind can be removed from them."""


class Halved(Protocol):
    """Says which parts of a layer belong to its attention and which to its feed-forward."""

    def of(self, name: str) -> int | None:
        """Return 0 for a part of the attention, 1 for one of the feed-forward, None for one of neither.

        Args:
            name: path of a parameter or attribute inside the layer.
        """


@dataclass(frozen=True)
class Sources:
    """Which layers of the parent each layer of the cut model comes from, one for each of its halves.

    Attributes:
        attention: for each new layer, the layer of the parent that its attention comes from.
        feed_forward: the same for its feed-forward; other layers only where halves are recombined.
        halves: the halves of each layer of the parent; needed where the two differ.
    """

    attention: Sequence[int]
    feed_forward: Sequence[int]
    halves: Sequence[Halved] = ()

    def positions(self, layer: int, name: str) -> list[int]:
        """Return the new layers, one or none, that take a parameter from a layer of the parent.

        Args:
            layer: number of the parent's layer.
            name: of the parameter, inside the layer.
        """
        pairs = enumerate(zip(self.attention, self.feed_forward, strict=True))
        return [at for at, pair in pairs if layer in pair and layer in self._of(pair, layer, name)]

    def traits(self, old: nn.ModuleList, position: int) -> dict[str, tuple[Any, ...]]:
        """Return the values that each trait of a new layer may have: those of the layers it comes from.

        A trait is a class, a shape or a plain attribute of a module (see :func:`traits`).

        Args:
            old: layers of the parent.
            position: number of the new layer.
        """
        pair = self.attention[position], self.feed_forward[position]
        values: dict[str, tuple[Any, ...]] = {}
        for layer in dict.fromkeys(pair):
            for name, value in traits(old[layer]).items():
                if layer in self._of(pair, layer, name):
                    values[name] = (*values.get(name, ()), value)
        return values

    def _of(self, pair: tuple[int, int], layer: int, name: str) -> tuple[int, ...]:
        """Return the layers of a pair that a parameter comes from: its half's; both if it is of no half."""
        if pair[0] == pair[1]:
            return pair
        half = self.halves[layer].of(name)
        return pair if half is None else pair[half : half + 1]


def structural_changes(
    old: nn.ModuleList, new: nn.ModuleList, sources: Sources, shares: tuple[int, int] = (1, 1)
) -> dict[int, str]:
    """Return how layers of the cut model are built differently from their originals; empty if none is.

    Args:
        old: layers of the parent.
        new: layers of the cut model; its weights may be on the meta device.
        sources: where each new layer comes from.
        shares: for a cut of width, how many units of each layer are left, and of how many; counts and sizes
            may shrink in this proportion.

    Returns:
        For each layer that differs, by its new position, words that name the first difference.
    """
    changes = {}
    for position, index in enumerate(sources.attention):
        before, after = sources.traits(old, position), traits(new[position])
        for name in sorted(before.keys() | after.keys()):
            expected, value = before.get(name, ("absent",)), after.get(name, "absent")
            if not any(_same(value, a, shares) for a in expected):
                changes[position] = (
                    f"layer {index} would become layer {position}, where its {name} is {value!r} instead of "
                    f"{expected[0]!r}; the family derives that from the position, and its config cannot say "
                    f"otherwise."
                )
                break
    return changes


def _same(value: Any, expected: Any, shares: tuple[int, int]) -> bool:
    """Return whether a trait is as expected, in value and type; or a count or size, shrunk by ``shares``."""
    if isinstance(value, tuple) and isinstance(expected, tuple) and len(value) == len(expected):
        return all(_same(a, b, shares) for a, b in zip(value, expected, strict=True))
    left, of = shares
    shrinks = type(value) is type(expected) is int and value * of == expected * left
    return (type(value), value) == (type(expected), expected) or shrinks


def alike(layers: nn.ModuleList) -> list[set[int]]:
    """Return the numbers of the layers in groups; the layers of a group differ in their weights alone."""
    kinds: dict[str, set[int]] = {}
    for index, layer in enumerate(layers):
        kinds.setdefault(repr(traits(layer)), set()).add(index)
    return list(kinds.values())


def traits(layer: nn.Module) -> dict[str, Any]:
    """Return everything that decides what a layer computes, except the values of its tensors.

    These *traits* are, by path inside the layer, the class of each module, its plain attributes, and the
    shapes of its tensors.
    """
    values: dict[str, Any] = {}
    for path, module in layer.named_modules():
        values[path or "class"] = type(module).__name__
        prefix = f"{path}." if path else ""
        for name, value in vars(module).items():
            if not name.startswith("_") and name not in IGNORED and isinstance(value, Plain):
                values[prefix + name] = value
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            values[prefix + name] = tuple(tensor.shape)
    return values
