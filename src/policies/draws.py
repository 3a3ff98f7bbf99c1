"""The masks that a search step draws, each with its loss and its gradient, averaged over the ranks.

Shapes: D draws, U units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from src.training.ranks import total, world


@dataclass(frozen=True)
class Draw:
    """A mask that was drawn, with its loss and its gradient.

    Attributes:
        gates_U: the gates as the policy sampled them, with their autograd graph.
        loss: the divergence under these gates, detached.
        grad_U: gradient of the loss with respect to the gates; None if the policy needs none.
    """

    gates_U: Tensor
    loss: Tensor
    grad_U: Tensor | None


def over_ranks(drawn: Sequence[Draw]) -> tuple[Tensor, Tensor | None]:
    """Return losses ``[D]`` and gates' gradients ``[D, U]`` (or None) of draws, each the mean over the ranks.

    So every rank hands the same bits to its policy, and all ranks make the same update.
    """
    losses_D = torch.stack([each.loss for each in drawn])
    grads = [each.grad_U for each in drawn if each.grad_U is not None]
    if world() == 1:
        return losses_D, torch.stack(grads) if grads else None
    columns = [losses_D[:, None], *([torch.stack(grads)] if grads else [])]
    table = total(torch.cat(columns, 1)) / world()
    return table[:, 0], table[:, 1:] if grads else None
