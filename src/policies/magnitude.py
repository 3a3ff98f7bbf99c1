"""Remove the units of the smallest weights; no data is read."""

from __future__ import annotations

import torch
from torch import Tensor

from src.errors import ConfigError
from src.policies.measuring import Probe
from src.policies.one_shot import OneShot


class Magnitude(OneShot):
    """Scores a unit by the sum of the absolute values of its weights without biases.

    It takes ``seed``, ``candidates`` and ``polish`` as the base class does.
    """

    works_on = ("layer", "half", "kv_group", "channel")
    any_count = True

    def refuse(self, quantize: str | None, adapted: bool, in_parts: bool) -> None:
        """Refuse what the base class refuses, and weights that are quantised or sharded.

        Raises:
            ConfigError: the weights are quantised, or no rank holds them whole.
        """
        super().refuse(quantize, adapted, in_parts)
        if quantize or in_parts:
            key = "model.quantize" if quantize else "trainer.strategy"
            raise ConfigError(
                f"{key}: Magnitude reads the weights themselves, which have to be whole and not quantised. "
                f"Load them so, or choose another policy."
            )

    def score(self, probe: Probe) -> Tensor:
        scores = torch.zeros(self.num_layers, self.units // self.num_layers)
        for layer, name, weight in probe.weights():
            if not name.endswith("bias"):
                scores[layer] += probe.share(layer, name, weight.detach().float().abs()).cpu()
        return scores.flatten()
