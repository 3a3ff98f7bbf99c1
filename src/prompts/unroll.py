"""Steps of gradient descent that are themselves differentiated: back-propagation through time, or its end.

The inner problem is ``theta' = theta - rate * dL/dtheta (theta, S)`` on data S; the outer one is a loss at
the theta that its steps end at, as a function of S. To differentiate through a step, its graph is held.
Truncated to a window, the graphs of the last W steps are held, and the theta that they start from counts as a
constant; W = T differentiates all T steps.

Shapes: T inner steps; theta and data of any shape.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Data = tuple[Tensor, ...]
Loss = Callable[[Tensor, Data], Tensor]
"""``(theta, data) -> loss``, twice differentiable."""


def descend(loss: Loss, theta: Tensor, data: Data, rate: float, steps: int) -> tuple[list[Tensor], Tensor]:
    """Make plain steps; return theta before and after each, and the norm of the gradient at each ``[T]``.

    Args:
        loss: the inner loss.
        theta: where the steps begin.
        data: what the loss is of.
        rate: of the gradient descent.
        steps: how many, T.
    """
    data, path, norms = tuple(x.detach() for x in data), [theta.detach()], [theta.new_zeros(0)]
    with torch.enable_grad():
        for _ in range(steps):
            leaf = path[-1].clone().requires_grad_()
            (grad,) = torch.autograd.grad(loss(leaf, data), leaf)
            path.append(path[-1] - rate * grad)
            norms.append(grad.norm()[None])
    return path, torch.cat(norms)


def unroll(loss: Loss, theta: Tensor, data: Data, rate: float, steps: int) -> Tensor:
    """Return theta after the steps of a window, as a differentiable function of the data.

    Args:
        loss: the inner loss.
        theta: where the window begins; a constant.
        data: what the loss is of, with a graph of its own or a leaf.
        rate: of the gradient descent.
        steps: length of the window, W.
    """
    theta = theta.detach().requires_grad_()
    for _ in range(steps):
        (grad,) = torch.autograd.grad(loss(theta, data), theta, create_graph=True)
        theta = theta - rate * grad
    return theta
