"""GRAIN: remove units one after the other, by their gradient in a distillation (arXiv 2212.07634, ACL 2023).

*The paper's*: the importance of a unit is the exponential average over steps of ``|dL/dg g|``, with L the
distillation loss alone; what is removed rises by a cubic schedule and does not come back. A loss on hidden
states trains weights there, and is kept out of the importance by a second backward pass.
*Ours*: gates on layers, halves, KV groups or channels, as many from each layer; the paper ranks neurons and
dimensions of heads over all layers, and lets nearly empty heads die first. A search distils and does nothing
else: so its one backward pass is the paper's first, and adapters may train beside it. A model with open gates
is its own teacher, without a gradient. Hence removal begins at the first step, with the unit of the least
salience (the same product, of the cross-entropy).

Shapes: D draws, U units.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import torch
from torch import Tensor

from src.mask import Unit
from src.policies.base import MaskPolicy
from src.policies.measuring import Probe
from src.policies.scores import salience
from src.ranges import Range, checked


class Grain(MaskPolicy):
    """Removes the units of the least importance, as many as the curriculum says, and none of them returns.

    ``logits`` holds the importance. :class:`src.callbacks.PruningCurriculum` with ``shape: cubic`` says how
    many units go; without it all go at the first step.

    Args:
        decay: share of the old importance that stays at each step; the paper takes 0.998 in many more steps.
        kwargs: ``always_keep``, ``seed``, ``candidates``, ``polish`` of the base class.
    """

    works_on = ("layer", "half", "kv_group", "channel")
    gone: Tensor
    steps: Tensor

    @checked
    def __init__(self, decay: Annotated[float, Range(float, 0, 1, open="high")] = 0.9, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.decay = decay

    def setup(
        self, num_layers: int, remove: int, pinned: Iterable[int] = (), unit: Unit = "layer", width: int = 1
    ) -> None:
        super().setup(num_layers, remove, pinned, unit, width)
        self.register_buffer("gone", torch.zeros(self.units))  # 1 for each unit that was removed
        self.register_buffer("steps", torch.zeros(()))

    def initialise(self, probe: Probe) -> None:
        with torch.no_grad():
            self.logits.copy_(salience(probe, self.units))

    def sample(self, step: int, draw: int) -> Tensor:
        """Return gates ``[U]`` without the units that went before, and without as many more as are due."""
        gates_U = self.spare(self.remove).argmax(self._worth()).to(self.logits)
        self.gone.copy_(torch.maximum(self.gone, 1 - gates_U))
        return gates_U

    def surrogate(self, gates_DL: Tensor, losses_D: Tensor, grads_DL: Tensor | None) -> Tensor:
        """Take ``|gate gradient|`` into the average; the salience of the start counts at the first step only.

        A gradient that is not finite counts as zero.
        """
        assert grads_DL is not None
        seen_U = (gates_DL * grads_DL).abs().mean(0).nan_to_num(0.0, 0.0, 0.0)
        with torch.no_grad():
            self.logits.copy_(seen_U if self.steps == 0 else self.logits.lerp(seen_U, 1 - self.decay))
        self.steps += 1
        return self.nothing()

    def harden(self) -> tuple[int, ...]:
        """Return the units of the final mask as it is now: none that is gone, nor the least of the others."""
        return tuple(self.space.argmax(self._worth()).nonzero().flatten().tolist())

    def _worth(self) -> Tensor:
        """Return the importance ``[U]``, that of a removed unit below what all others could make up for."""
        importance_U = self.logits.detach().double()
        return importance_U - self.gone.double() * (1 + 2 * importance_U.sum())
