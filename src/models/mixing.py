"""Mix a layer's output into the residual stream by its gate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def mix(h_in: Tensor, h_out: Tensor, gate: Tensor, value: float | None = None) -> Tensor:
    """Return ``lerp(h_in, h_out, gate)``.

    Args:
        h_in: the stream in front of the layer.
        h_out: the stream behind it.
        gate: a factor of both, a scalar or one for each row.
        value: the gate as a number, of rows the mean; None if it is not known.
    """
    if value in (0.0, 1.0) and torch.is_grad_enabled():
        switch: Callable[..., Tensor] = _Switch.apply
        return switch(h_in, h_out, gate, value == 1.0)
    return torch.lerp(h_in, h_out, gate)


class _Switch(torch.autograd.Function):
    """Does what ``lerp`` does at a gate of 0 or 1, without its products and sums with zeros."""

    @staticmethod
    def forward(ctx: Any, h_in: Tensor, h_out: Tensor, gate: Tensor, opened: bool) -> Tensor:
        ctx.save_for_backward(h_in, h_out)
        ctx.opened, ctx.shape = opened, gate.shape
        return (h_out if opened else h_in).clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        h_in, h_out = ctx.saved_tensors
        own = (grad * (h_out - h_in)).sum_to_size(ctx.shape) if ctx.needs_input_grad[2] else None
        return (None, grad, own, None) if ctx.opened else (grad, None, own, None)
