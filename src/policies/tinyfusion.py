"""TinyFusion (arXiv 2412.01199): a categorical choice in each block of layers, learned while adapters train.

The layers are divided into blocks of M neighbours, of which N stay (N:M). Each of the C(M, N) ways to choose
them is one class of a categorical distribution. A draw adds Gumbel noise to the logits and takes the highest
way of each block. The backward pass goes through a softmax with a temperature (straight-through).

TinyFusion looks for the mask that recovers best, not for the one that is best before recovery. So adapters of
the weights train beside the mask (``model.adapters``, :mod:`src.training.adapters`). Without adapters, only
the distribution is learned.

From TinyFusion and its public code:

* the blocks and the distribution, uniform at the start;
* the factor of 100 on the learned numbers, and a temperature from 4 to 0.1;
* AdamW with a rate of 1e-3 on these numbers, and LoRA on all linear maps;
* the result: the likeliest way of each block.

Ours:

* the divergence from the teacher in place of the diffusion loss;
* one draw for a batch in place of one for each row;
* no moving average of the learned numbers (theirs is of 0.999, over thousands of steps);
* blocks of unequal size where the numbers do not divide;
* the learning rate of the adapters.

Shapes: L layers, M layers of a block, C ways to choose among them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from src.errors import ConfigError
from src.mask import Unit
from src.policies.base import MaskPolicy
from src.policies.concave import lengths
from src.policies.relaxations import gumbel, straight_through
from src.ranges import MOST, Positive, Range, checked
from src.units.spaces import Kept

LIMIT = 10_000
"""Most ways that a block may have."""


class TinyFusion(MaskPolicy):
    """Learns, for each block of layers, the probability of each way to keep N of its M layers.

    The blocks are independent, and every draw removes the exact count.

    Args:
        block: smallest number of layers in a block. There are as many blocks as this allows, and at most one
            for each layer to remove.
        scale: factor from the learned numbers to the logits.
        temperature: of the softmax; a callback may anneal it.
        kwargs: ``always_keep``, ``seed``, ``candidates``, ``polish`` of the base class.

    Raises:
        ConfigError: by :meth:`setup`, a block has more than ``LIMIT`` ways; by :meth:`sample`, a
            :class:`src.callbacks.PruningCurriculum` asks for fewer removed layers than in the end.
    """

    @checked
    def __init__(
        self,
        block: Annotated[int, Range(int, 2, MOST)] = 4,
        scale: Positive = 100.0,
        temperature: Positive = 4.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.block, self.scale, self.temperature = block, scale, temperature

    def setup(
        self, num_layers: int, remove: int, pinned: Iterable[int] = (), unit: Unit = "layer", width: int = 1
    ) -> None:
        super().setup(num_layers, remove, pinned, unit, width)
        count = max(1, min(remove, len(self.free) // self.block))
        sizes, gone = lengths(len(self.free), count), lengths(remove, count)
        ways = [math.comb(m, n) for m, n in zip(sizes, gone, strict=True)]
        if max(ways) > LIMIT:
            raise ConfigError(
                f"policy.block: a block of {sizes[0]} layers of which {gone[0]} go has {ways[0]:,} ways; "
                f"accepted: up to {LIMIT:,}. Give a smaller block."
            )
        self.ways = [ways_to_keep(m, n) for m, n in zip(sizes, gone, strict=True)]
        self.logits = nn.Parameter(torch.zeros(sum(ways)))  # one for each way of each block

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the logits ``[C]`` of each block, and its ways ``[C, M]``: 1 where a layer stays."""
        split = self.logits.cpu().split([len(ways) for ways in self.ways])
        for logits_C, ways_CM in zip(split, self.ways, strict=True):
            yield self.scale * logits_C, ways_CM

    def sample(self, step: int, draw: int) -> Tensor:
        if self.remove != self.target:
            raise ConfigError(
                "trainer.callbacks: TinyFusion's blocks lose a fixed number of layers; set until of "
                "src.callbacks.PruningCurriculum to 0."
            )
        generator = self.generator(step, draw)
        chosen = []
        for logits_C, ways_CM in self.blocks():
            z_C = logits_C + gumbel(len(logits_C), generator)
            hard_C = nn.functional.one_hot(z_C.argmax(), len(z_C)).to(z_C)
            chosen.append(straight_through(hard_C, torch.softmax(z_C / self.temperature, 0)) @ ways_CM)
        return self._gates(chosen)

    def _gates(self, blocks: list[Tensor]) -> Tensor:
        """Return the gates ``[L]`` from those of each block; layers that may not be removed are open."""
        gates = torch.ones(self.num_layers, device=self.logits.device)
        gates[self.free] = torch.cat(blocks).to(gates)
        return gates

    def harden(self) -> Kept:
        """Return the layers that the likeliest way of each block keeps."""
        gates = self._gates([ways_CM[logits_C.argmax()] for logits_C, ways_CM in self.blocks()])
        return tuple(gates.nonzero()[:, 0].tolist())

    def worth(self) -> list[float]:
        """Return the keep probabilities, because the logits belong to ways, not to layers."""
        return self.keep_probabilities().tolist()

    @torch.no_grad()
    def keep_probabilities(self) -> Tensor:
        return self._gates(
            [torch.softmax(logits_C, 0) @ ways_CM for logits_C, ways_CM in self.blocks()]
        ).cpu()


def ways_to_keep(layers: int, remove: int) -> Tensor:
    """Return all ways to remove ``remove`` layers of a block of ``layers``: ``[C, M]``, 1 where one stays."""
    gone = list(itertools.combinations(range(layers), remove))
    return torch.ones(len(gone), layers).scatter(1, torch.tensor(gone).view(len(gone), remove), 0.0)
