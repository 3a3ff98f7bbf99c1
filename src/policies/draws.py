"""The masks that a search step draws, each with its loss and its gradient, averaged over the ranks.

Masks that begin alike share what they compute. The passes of a step go by their gates, the open model (the
teacher) first, and each starts where it first differs from the one before (:mod:`src.models.prefixes`). The
graph of a shared part stays until the last pass that shares it, and equal masks are measured once. Every
number is that of passes on their own, to the last bit.

Shapes: D draws, U units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Protocol

import torch
from torch import Tensor

from src.data.batches import Batch, Supervised
from src.losses.signals import Signal
from src.models.gated import Gates
from src.models.prefixes import Prefixes
from src.policies.base import MaskPolicy
from src.training.adapters import Adapters
from src.training.ranks import WholeBatch, total, world


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


class Searching(Protocol):
    """What the measuring of draws asks of a search."""

    policy: MaskPolicy
    adapters: Adapters | None
    gates: Gates
    num_layers: int

    def teacher_signal(self, rows: Supervised, open_U: Tensor | None = None) -> Signal:
        """Return the teacher's signal on a batch; where it is the open model, under the gates ``open_U``."""

    def divergence(
        self, rows: Supervised, signal: Signal, gates_U: Tensor | None, *, whole: WholeBatch | None = None
    ) -> Tensor:
        """Return the loss of the model under gates."""

    def spent(self, batch: Batch, layers: float) -> None:
        """Count the cost of a pass of a batch through so many layers."""


def apart(
    search: Searching, rows: Supervised, drawn: Sequence[Tensor], whole: WholeBatch | None = None
) -> list[Draw]:
    """Measure masks one after the other; the graph of each is freed.

    Args:
        search: the search that drew them; its adapters take the gradients of all.
        rows: a batch and its supervised positions.
        drawn: gates ``[U]`` of each mask, with their autograd graph.
        whole: the batch of all ranks that this one is a part of; None if it is on its own.
    """
    signal = search.teacher_signal(rows)
    return [draw(search, rows, signal, gates_U, whole) for gates_U in drawn]


def draw(
    search: Searching, rows: Supervised, signal: Signal, gates_U: Tensor, whole: WholeBatch | None = None
) -> Draw:
    """Measure one mask against the teacher's signal; other arguments are those of :func:`apart`."""
    leaf_U, grad_U = gates_U.detach().requires_grad_(search.policy.needs_gradient), None
    moving = [] if search.adapters is None else search.adapters.moving()
    inputs = [*([leaf_U] if search.policy.needs_gradient else []), *moving]
    with torch.set_grad_enabled(bool(inputs)):
        loss = search.divergence(rows, signal, leaf_U, whole=whole)
    if inputs:
        grads = list(torch.autograd.grad(loss, inputs, allow_unused=bool(moving)))
        search.spent(rows.batch, search.num_layers)
        grad_U = grads.pop(0) if search.policy.needs_gradient else None
        if search.adapters is not None:
            search.adapters.take(grads)
    return Draw(gates_U, loss.detach(), grad_U)


def together(
    search: Searching, rows: Supervised, drawn: Sequence[Tensor], whole: WholeBatch | None = None
) -> list[Draw]:
    """Measure masks as :func:`apart` does; what they and the teacher have in common is computed once.

    The model is frozen, without adapters, and its pass may start in front of any layer
    (:func:`src.models.midway.resumes`).
    """
    graded, done = search.policy.needs_gradient, dict[str, Draw]()
    # Gates are compared in words: a gate that is no number is not equal to itself.
    by_gates = {str(gates_U.tolist()): gates_U.detach() for gates_U in drawn}
    order = sorted(by_gates, key=lambda words: by_gates[words].tolist(), reverse=True)
    prefixes, first = Prefixes(search.gates.each, opened=False), by_gates[order[0]].tolist()
    leaves = [torch.ones_like(by_gates[order[0]]).requires_grad_(graded)]
    with search.gates.remember(prefixes):
        prefixes.graded = len(list(takewhile(lambda gate: gate == 1.0, first))) if graded else 0
        signal = search.teacher_signal(rows, leaves[0])
        prefixes.graded = 0
        for gates in order:
            leaves.append(by_gates[gates].requires_grad_(graded))
            with torch.set_grad_enabled(graded):
                loss = search.divergence(rows, signal, leaves[-1], whole=whole)
            grad_U = None
            if graded:
                # The gates of a shared part are those of the pass that ran it.
                parts = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
                grad_U = torch.stack([part for part in parts if part is not None]).sum(0)
                search.spent(rows.batch, search.num_layers)
            done[gates] = Draw(leaves[-1], loss.detach(), grad_U)
            del loss  # and with it the graph, but for what the next pass shares
    return [replace(done[str(gates_U.tolist())], gates_U=gates_U) for gates_U in drawn]


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
