"""Fold a linear map of what a mixture of experts writes into the experts' weights, exactly.

Experts e with routing weights r_e, which depend on the token, write ``z = sum_e r_e W_e a_e`` to the stream.
z is linear in no single input, so the regression of :mod:`src.repair.fold` on a down projection's input is
not possible. A linear map M of z, however, can be folded in:

    M z  =  sum_e r_e (M W_e) a_e,    so    W_e <- M W_e    in every expert,

and the same for biases and shared experts. Routing stays the same, because it comes before. The weights to
change are found by experiment (:func:`last_weights`), so no names or layouts of model families are needed.

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
"""Weights of a module by name: for each, the axis that runs over the hidden channels that it writes."""


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts that writes to the stream (a :class:`src.repair.writers.Writer`).

    Its output z is linear in some of its weights. Its features, on which a repair is fitted, are z itself,
    before the change.

    Attributes:
        name: path of the module inside the layer.
        module: the mixture of experts.
        scale: factor with which z is added to the stream.
        weights: the weights that z is linear in, if all change together.
        constant: false: the features have no constant 1, because biases are among the weights.
    """

    name: str
    module: nn.Module
    scale: float
    weights: Weights
    constant: bool = False

    @property
    def map_FH(self) -> Tensor:
        size = next(self.module.get_parameter(name).shape[axis] for name, axis in self.weights.items())
        return self.scale * torch.eye(size, dtype=torch.float64, device=next(self.module.parameters()).device)

    def watch(self, keep: Callable[[Tensor], None]) -> RemovableHandle:
        return self.module.register_forward_hook(lambda _m, _a, out: keep(first(out)))

    def add(self, delta_FH: Tensor) -> None:
        """Fold ``M = I + delta^T / scale`` into the weights, delta ``[H, H]``; 0 changes no bit of them."""
        for name, axis in self.weights.items():
            fold_in(self.module.get_parameter(name).data, axis, delta_FH / self.scale)


def fold_in(weight: Tensor, axis: int, delta_HH: Tensor) -> Tensor:
    """Change a weight w to ``w + w @ delta`` along one of its axes, in place, and return it.

    Args:
        weight: of any shape.
        axis: the axis of length H that delta acts on.
        delta_HH: the change; its type is the precision of the computation.
    """
    rows = weight.movedim(axis, -1)
    for part in rows if rows.ndim > 2 else [rows]:  # one expert at a time, to save memory
        wide = part.to(delta_HH)
        part.copy_(wide + wide @ delta_HH)
    return weight


@torch.no_grad()
def last_weights(
    module: nn.Module, args: Any, kwargs: dict[str, Any], others: Set[int], tolerance: float
) -> Weights:
    """Return the weights of a module that a linear map of its output can be folded into.

    The contribution c of a weight is the output minus the output with that weight at zero. A weight is one of
    those sought if folding a random M into it changes c to M c. It is then set to zero before the next weight
    is tried, so that rounding of large contributions does not hide small ones. At the end, M folded into all
    of them must change the output z to M z.

    Args:
        module: a mixture of experts, or another module that writes to the stream.
        args: positional arguments of a call of the module.
        kwargs: named arguments of that call.
        others: ``id()`` of each parameter that another layer uses too, and that must not change.
        tolerance: largest relative difference of outputs that count as equal.

    Returns:
        For each such weight, the axis to fold along; empty if the output is not linear in them.
    """

    def out(weights: dict[str, Tensor]) -> Tensor:
        output: Tensor = first(functional_call(module, weights, args, kwargs))
        return output.flatten(0, -2).float()

    def folded(name: str, axis: int) -> Tensor:
        return fold_in(own[name].detach().clone(), axis, delta_HH)

    def near(one: Tensor, other: Tensor) -> bool:
        return float((one - other).norm()) < tolerance * float(other.norm())

    own = {name: p for name, p in module.named_parameters() if id(p) not in others}
    z_NH = left_NH = out({})
    size = z_NH.shape[-1]
    draws = torch.randn(size, size, generator=torch.Generator().manual_seed(0)) / size**0.5
    delta_HH = draws.to(z_NH)
    linear, zeroed = Weights(), dict[str, Tensor]()
    for name, weight in own.items():
        zero = torch.zeros_like(weight)
        contribution_NH = left_NH - out({**zeroed, name: zero})
        for axis in [axis for axis, length in enumerate(weight.shape) if length == size]:
            if near(out({**zeroed, name: folded(name, axis)}) - left_NH, contribution_NH @ delta_HH):
                linear[name], zeroed[name] = axis, zero
                left_NH = out(zeroed)
                break
    # Experts that no token is routed to contribute nothing; their weights go with those of the other experts.
    axes = {_without_expert(name): axis for name, axis in linear.items()}
    linear |= {name: axes[_without_expert(name)] for name in own if _without_expert(name) in axes}
    whole = linear and near(
        out({name: folded(name, axis) for name, axis in linear.items()}), z_NH + z_NH @ delta_HH
    )
    return linear if whole else {}


def _without_expert(name: str) -> str:
    """Return a weight's name without the number of its expert."""
    return re.sub(r"(^|\.)\d+(?=\.)", r"\1N", name, count=1)
