"""A linear map whose backward pass adds the weights' gradients to buffers, in float32 and a slice at a time.

Autograd would make a second tensor as large as the weights for every chunk of tokens, and add up the chunks
in the type of the weights.

Shapes: n tokens of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SLICE = 1 << 13
"""Number of vocabulary entries whose gradients are computed at a time."""


def summing(linear: nn.Module, x_nH: Tensor, into: tuple[Tensor, ...]) -> Tensor:
    """Return ``linear(x)`` ``[n, V]``, whose backward pass adds to ``into`` instead of to the weights.

    Args:
        linear: a linear layer whose weights all train.
        x_nH: hidden states.
        into: a float32 buffer for the weight, and one for the bias if there is one.
    """
    run: Callable[..., Tensor] = _Linear.apply
    return run(x_nH, linear.weight, linear.bias, into)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_nH: Tensor, weight: Tensor, bias: Tensor | None, into: Any) -> Tensor:
        ctx.parts = x_nH, weight, into
        return F.linear(x_nH, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g_nV: Tensor) -> tuple[Tensor | None, ...]:
        x_nH, weight, into = ctx.parts
        with torch.autocast(g_nV.device.type, enabled=False):
            same = x_nH.to(g_nV.dtype)
            for grads_nV, total in zip(g_nV.split(SLICE, 1), into[0].split(SLICE), strict=True):
                total += grads_nV.T @ same
            for total in into[1:]:
                total += g_nV.sum(0, dtype=total.dtype)
            return (g_nV @ weight.to(g_nV.dtype)).to(x_nH.dtype), None, None, None
