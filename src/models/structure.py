"""Compare the layers of a cut model with their originals, by everything but their weights.

A layer of transformers decides what it is when it is built, from the config and its position: attention
kind, window, expert or dense MLP, scale, rotary or none. So two layers that agree in their modules, shapes
and plain attributes compute the same function of the same tensors, and a difference names what the config
failed to carry over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

IGNORED = {"layer_idx", "layer_id", "layer_number", "num_hidden_layers", "training", "gradient_checkpointing"}
"""Position and depth themselves, which change as they should (an address in the cache); and running state."""
Plain = bool | int | float | str | None


def structural_changes(old: nn.ModuleList, new: nn.ModuleList, keep: Sequence[int]) -> dict[int, str]:
    """Return what distinguishes each cut layer from its original, by new position; empty if nothing does.

    Args:
        old: layers of the parent.
        new: layers of the cut model; its weights may be on the meta device.
        keep: for each new layer, the index of its original.
    """
    found = {}
    for position, index in enumerate(keep):
        before, after = _traits(old[index]), _traits(new[position])
        for name in sorted(before.keys() | after.keys()):
            a, b = before.get(name, "absent"), after.get(name, "absent")
            if (type(a), a) != (type(b), b):
                found[position] = (
                    f"layer {index} would become layer {position}, where its {name} is {b!r} instead of "
                    f"{a!r}; the family derives that from the position, and its config cannot say otherwise."
                )
                break
    return found


def alike(layers: nn.ModuleList) -> list[set[int]]:
    """Return the layers sorted into kinds, those of one kind differing in their weights alone."""
    kinds: dict[str, set[int]] = {}
    for index, layer in enumerate(layers):
        kinds.setdefault(repr(_traits(layer)), set()).add(index)
    return list(kinds.values())


def _traits(layer: nn.Module) -> dict[str, Any]:
    """Everything that makes a layer compute what it computes, but for the values of its tensors."""
    traits: dict[str, Any] = {}
    for path, module in layer.named_modules():
        traits[path or "class"] = type(module).__name__
        prefix = f"{path}." if path else ""
        for name, value in vars(module).items():
            if not name.startswith("_") and name not in IGNORED and isinstance(value, Plain):
                traits[prefix + name] = value
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            traits[prefix + name] = tuple(tensor.shape)
    return traits
