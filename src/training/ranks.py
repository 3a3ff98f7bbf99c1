"""Take sums and means over a batch that is divided among several ranks.

If every rank averaged over its own tokens, a token on a rank with few would weigh more. So every rank here
knows how many positions the whole batch has: the mean of the ranks' losses is the loss of one process that
holds all rows, and so are their gradients.

Shapes: N entries of this rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def total(x: Tensor) -> Tensor:
    """Return the sum of ``x`` over the ranks, the same bits on all of them."""
    if world() > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def from_all(mine: T) -> list[T]:
    """Return the values of all ranks, in the order of the ranks.

    Args:
        mine: the value of this rank; anything that can be pickled.
    """
    if world() == 1:
        return [mine]
    gathered = [mine] * world()
    dist.all_gather_object(gathered, mine)
    return gathered


def least(number: int, device: torch.device | str) -> int:
    """Return the least of the ranks' numbers.

    Args:
        number: of this rank.
        device: on which the ranks communicate.
    """
    if world() == 1:
        return number
    numbers = torch.tensor(number, device=device)
    dist.all_reduce(numbers, dist.ReduceOp.MIN)
    return int(numbers)


def most(number: int, device: torch.device | str) -> int:
    """Return the greatest of the ranks' numbers.

    Args:
        number: of this rank.
        device: on which the ranks communicate.
    """
    return -least(-number, device)


class WholeBatch:
    """Counts and means over the batch of all ranks, of which each holds a part.

    Args:
        positions: supervised positions of this rank.
        tokens: tokens of this rank that are not padding.
        device: device on which the ranks communicate.

    Attributes:
        share: supervised positions of a rank, on average over the ranks. A sum over this rank's positions is
            divided by it, so that the mean over the ranks is the mean over all positions.
        positions: supervised positions of all ranks.
        tokens: tokens of all ranks.
    """

    def __init__(self, positions: int, tokens: int, device: torch.device | str) -> None:
        self.positions, self.tokens = positions, tokens
        if world() > 1:
            self.positions, self.tokens = total(torch.tensor([positions, tokens], device=device)).tolist()
        self.share = self.positions / world()

    def mean(self, x_N: Tensor) -> Tensor:
        """Return the mean over the entries of all ranks.

        Args:
            x_N: one entry for each supervised position of this rank.
        """
        if world() == 1:
            return x_N.mean()
        return total(x_N.sum()) / self.positions

    def gather(self, x_N: Tensor) -> Tensor:
        """Return the entries of all ranks, flat, in the order of the ranks.

        Args:
            x_N: entries of this rank; ranks may have different numbers of them.
        """
        if world() == 1:
            return x_N
        sizes = [int(n) for n in total(_one_hot(len(x_N), x_N.device)).tolist()]
        padded = x_N.new_zeros(max(sizes))
        padded[: len(x_N)] = x_N
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])


def _one_hot(size: int, device: torch.device) -> Tensor:
    sizes = torch.zeros(world(), dtype=torch.long, device=device)
    sizes[dist.get_rank()] = size
    return sizes


class MicroBatches:
    """Makes the gradient of accumulated micro-batches equal to that of one batch with all their tokens.

    Lightning takes the mean of the micro-batches' losses, whatever the numbers of their tokens. So each loss
    is multiplied by its number of positions, relative to that of the first micro-batch. Before the step, the
    gradients are divided by the mean of these factors.
    """

    def __init__(self) -> None:
        self.first = self.sum = 0.0

    def weigh(self, loss: Tensor, share: float) -> Tensor:
        """Return the loss of the next micro-batch, weighted.

        Args:
            loss: mean over the positions of the micro-batch.
            share: its number of positions on each rank, on average.
        """
        self.first = self.first or share
        self.sum += share
        return loss * (share / (self.first or 1))  # of no position at all the loss is zero

    def settle(self, parameters: Iterable[Tensor], count: int) -> None:
        """Scale the gradients before the optimiser steps, and forget the micro-batches of this step.

        Args:
            parameters: those that train.
            count: the number by which Lightning divided each loss.
        """
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(count * self.first / (self.sum or 1))
        self.first = self.sum = 0.0
