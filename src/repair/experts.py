"""A linear map behind a mixture of experts, held exactly by the experts' own weights.

Experts e, with gates g_e that depend on the token, write  ``z = sum_e g_e W_e a_e``  to the stream. There is
no one input that z is linear in, so no regression on a down projection's input. But a map M of z has a place:

    M z  =  sum_e g_e (M W_e) a_e,    so    W_e <- M W_e    in every expert alike,

biases and shared experts included. Routing does not change, because it happens before. The weights that take
M are found by what they do, not by a family's names or layouts.

Shapes: N tokens, H hidden.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from src.models.layers import first

Weights = dict[str, int]
"""Of some weights of a module: the axis of each, by name, that runs over the hidden channels it writes."""


@dataclass(frozen=True)
class Mixture:
    """A module whose output z is added to the stream and linear in some of its weights; its features are z.

    See :class:`src.repair.writers.Writer`.

    Attributes:
        name: path of the module inside the layer.
        module: it.
        scale: factor with which z is added.
        weights: those that z is linear in, taken together.
    """

    name: str
    module: nn.Module
    scale: float
    weights: Weights
    constant: bool = False

    def watch(self, keep: Callable[[Tensor], None]) -> RemovableHandle:
        return self.module.register_forward_hook(lambda _m, _a, out: keep(first(out)))

    def add(self, delta_FH: Tensor) -> None:
        """Fold ``M = I + delta^T / scale`` into the weights; with delta = 0 they stay equal."""
        for name, axis in self.weights.items():
            push(self.module.get_parameter(name).data, axis, delta_FH / self.scale)


def push(weight: Tensor, axis: int, delta_HH: Tensor) -> Tensor:
    """Change ``w`` to ``w + w @ delta`` along an axis, in place, in the precision of delta."""
    rows = weight.movedim(axis, -1)
    for part in rows if rows.ndim > 2 else [rows]:  # one expert at a time: memory
        wide = part.to(delta_HH)
        part.copy_(wide + wide @ delta_HH)
    return weight


@torch.no_grad()
def last_weights(
    module: nn.Module, args: Any, kwargs: dict[str, Any], others: Set[int], tolerance: float
) -> Weights:
    """Return the weights of a module that a linear map of its output can be folded into.

    A weight belongs to them if folding a random M into it turns what it contributes, c, into M c. Each one
    found is silenced before the next is tried, so that small contributions are not lost in the rounding of
    large ones. In the end all together must turn the output z into M z.

    Args:
        module: a mixture of experts, or whatever writes to the stream.
        args: what it was called with, by position.
        kwargs: the same by name.
        others: ids of parameters that must not change.
        tolerance: largest relative difference of two equal outputs.

    Returns:
        The weights; none, if they do not make up the output.
    """

    def out(weights: dict[str, Tensor]) -> Tensor:
        given: Tensor = first(functional_call(module, weights, args, kwargs))
        return given.flatten(0, -2).float()

    def folded(name: str, axis: int) -> Tensor:
        return push(own[name].detach().clone(), axis, delta_HH)

    def near(one: Tensor, other: Tensor) -> bool:
        return float((one - other).norm()) < tolerance * float(other.norm())

    own = {name: p for name, p in module.named_parameters() if id(p) not in others}
    z_NH = left_NH = out({})
    size = z_NH.shape[-1]
    draws = torch.randn(size, size, generator=torch.Generator().manual_seed(0)) / size**0.5
    delta_HH = draws.to(z_NH)
    found, silent = Weights(), dict[str, Tensor]()
    for name, weight in own.items():
        zero = torch.zeros_like(weight)
        given_NH = left_NH - out({**silent, name: zero})
        for axis in [axis for axis, length in enumerate(weight.shape) if length == size]:
            if near(out({**silent, name: folded(name, axis)}) - left_NH, given_NH @ delta_HH):
                found[name], silent[name] = axis, zero
                left_NH = out(silent)
                break
    kinds = {_kind(name): axis for name, axis in found.items()}
    found |= {
        name: kinds[_kind(name)] for name in own if _kind(name) in kinds
    }  # of experts that no token chose
    whole = found and near(
        out({name: folded(name, axis) for name, axis in found.items()}), z_NH + z_NH @ delta_HH
    )
    return found if whole else {}


def _kind(name: str) -> str:
    """Return a weight's name without the number of its expert."""
    return re.sub(r"(^|\.)\d+(?=\.)", r"\1N", name, count=1)
