"""Shortened LLaMA, Taylor criterion (arXiv 2402.02834): remove the units whose weights matter least."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from src.policies.measuring import Probe
from src.policies.one_shot import OneShot

PLUS = (0, 1, 2, 3, -2, -1)
"""Layers that the variant Taylor+ never removes."""


class Taylor(OneShot):
    """Scores a unit by the sum of ``|w dLoss/dw|`` over its weights without biases.

    arXiv 2402.02834 scores layers. The weights of a KV group or a channel are its rows and columns, as in
    LLM-Pruner (arXiv 2305.11627).

    It takes one forward and one backward pass, with a gradient for every weight: memory for a second copy of
    the layers.

    Args:
        plus: never remove the first four and the last two layers either (the variant Taylor+).
        always_keep: layers that may not be removed, such as ``[0, -1]``; negative counts from the end.
        kwargs: ``seed``, ``candidates``, ``polish`` of the base class.
    """

    works_on = ("layer", "half", "kv_group", "channel")
    any_count = True
    differentiates_weights = True

    def __init__(self, plus: bool = False, always_keep: Iterable[int] = (), **kwargs: Any) -> None:
        super().__init__(always_keep=[*always_keep, *(PLUS if plus else ())], **kwargs)

    def score(self, probe: Probe) -> Tensor:
        scores = torch.zeros(self.num_layers, self.units // self.num_layers)

        def visit(layer: int, module: nn.Module) -> None:
            for name, weight in module.named_parameters():
                if weight.grad is not None and not name.endswith("bias"):
                    salience = (weight.detach().float() * weight.grad.float()).abs()
                    scores[layer] += probe.share(layer, name, salience).cpu()

        probe.gradients(visit)
        return scores.flatten()
