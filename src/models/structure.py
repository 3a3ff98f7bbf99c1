"""Compare the layers of a cut model with their originals, by everything but their weights.

A layer of transformers decides what it is when it is built, from the config and its position: attention
kind, window, expert or dense MLP, scale, rotary or none. So two layers that agree in their modules, shapes,
plain attributes and constant buffers compute the same function of the same weights, and a difference names
what the config failed to carry over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

OWN_POSITION = {"layer_idx", "layer_id", "layer_number"}
"""The position itself, an address in the cache: it changes, as it should."""
RUNNING_STATE = {"training", "gradient_checkpointing"}
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
        for name in before.keys() | after.keys():
            a, b = before.get(name, "absent"), after.get(name, "absent")
            if not _same(a, b):
                found[position] = (
                    f"layer {index} would become layer {position}, where its {name} is {_short(b)} "
                    f"instead of {_short(a)}; the family derives it from the position, and no key of its "
                    f"config can say otherwise."
                )
    return found


def _traits(layer: nn.Module) -> dict[str, Any]:
    """Everything that makes a layer compute what it computes, but for its weights."""
    traits: dict[str, Any] = {}
    for path, module in layer.named_modules():
        traits[path or "class"] = type(module).__name__
        for name, value in vars(module).items():
            if name.startswith("_") or name in OWN_POSITION | RUNNING_STATE:
                continue
            if isinstance(value, Plain):
                traits[f"{path}.{name}".lstrip(".")] = value
        constants = module._non_persistent_buffers_set
        for name, buffer in module.named_buffers(recurse=False):
            traits[f"{path}.{name}".lstrip(".")] = buffer if name in constants else buffer.shape
        for name, parameter in module.named_parameters(recurse=False):
            traits[f"{path}.{name}".lstrip(".")] = parameter.shape
    return traits


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and a == b
    return a.shape == b.shape and (a.is_meta or b.is_meta or torch.equal(a.cpu(), b.to(a.dtype).cpu()))


def _short(value: Any) -> str:
    return "another constant" if isinstance(value, Tensor) else repr(value)
