"""Categorical choices in blocks of layers, learned while adapters train: TinyFusion (arXiv 2412.01199).

The layers are cut into blocks. In a block of M layers N stay (N:M), and each of the C(M, N) ways to choose
them is one class of a categorical law. A draw adds Gumbel noise and takes the highest way of each block;
the backward pass goes through a softmax at a temperature (straight-through). The paper wants a mask that
recovers well, not one that is good as it stands, so adapters of the weights train along with it
(``model.adapters``, :mod:`src.training.adapters`); without them this is the law alone.

From the paper and its public code: the blocks, the law, the factor of 100 on the learned numbers, equal
chances at the start, a temperature from 4 to 0.1, AdamW with a rate of 1e-3 on those numbers, LoRA on all
linear maps, and the answer, which is the likeliest way of each block. Ours: the divergence from the teacher
in place of the diffusion loss, a draw for a batch in place of one for each row, no moving average of the
learned numbers (of 0.999, over thousands of steps), blocks of unequal size where the numbers do not divide,
and the adapters' rate.

Shapes: L layers, C ways of one block, M its layers.
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

LIMIT = 10_000
"""Ways of one block above which its law is refused."""


class TinyFusion(MaskPolicy):
    """A categorical law over the N:M ways of each block of layers; independent blocks, exact counts.

    Args:
        block: layers of a block, at least; there are as many blocks as that allows and layers to remove.
        scale: factor on the learned numbers, which makes them logits.
        temperature: of the softmax; a callback anneals it.
        kwargs: ``always_keep``, ``seed``, ``candidates``, ``polish`` of the base class.

    Raises:
        ConfigError: a block has too many ways.
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

    def setup(self, num_layers: int, remove: int, pinned: Iterable[int] = (), unit: Unit = "layer") -> None:
        super().setup(num_layers, remove, pinned, unit)
        count = max(1, min(remove, len(self.free) // self.block))
        sizes, gone = lengths(len(self.free), count), lengths(remove, count)
        ways = [math.comb(m, n) for m, n in zip(sizes, gone, strict=True)]
        if max(ways) > LIMIT:
            raise ConfigError(
                f"policy.block: a block of {sizes[0]} layers of which {gone[0]} go has {ways[0]:,} ways; "
                f"accepted: up to {LIMIT:,}. Give a smaller block."
            )
        self.ways = [keeps(m, n) for m, n in zip(sizes, gone, strict=True)]
        self.logits = nn.Parameter(torch.zeros(sum(ways)))  # one for each way of each block

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits ``[C]`` of each block, and its ways ``[C, M]``, 1 where a layer stays."""
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
        """Gates ``[L]`` from those of each block; layers that may not go are open."""
        gates = torch.ones(self.num_layers, device=self.logits.device)
        gates[self.free] = torch.cat(blocks).to(gates)
        return gates

    def harden(self) -> tuple[int, ...]:
        """The layers of each block's likeliest way."""
        gates = self._gates([ways_CM[logits_C.argmax()] for logits_C, ways_CM in self.blocks()])
        return tuple(gates.nonzero()[:, 0].tolist())

    def worth(self) -> list[float]:
        """The keep probabilities: the logits are not one for each layer."""
        return self.keep_probabilities().tolist()

    @torch.no_grad()
    def keep_probabilities(self) -> Tensor:
        return self._gates(
            [torch.softmax(logits_C, 0) @ ways_CM for logits_C, ways_CM in self.blocks()]
        ).cpu()


def keeps(layers: int, remove: int) -> Tensor:
    """All ways to remove some layers of a block: ``[C, M]``, 1 where a layer stays."""
    gone = list(itertools.combinations(range(layers), remove))
    return torch.ones(len(gone), layers).scatter(1, torch.tensor(gone).view(len(gone), remove), 0.0)
