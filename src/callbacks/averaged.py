"""Average the weights of a recovery over its steps; what is validated and exported is the average."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from src.errors import ConfigError
from src.ranges import Share, checked
from src.training.strategies import SHARDED, kind

TRAINED = "unaveraged"
"""Key of a checkpoint under which the weights that train lie, since its own weights are the average."""


class AveragedWeights(Callback):
    """Keeps a moving average of the weights that train. They themselves train as they would without it.

        average += max(1 / n, 1 - decay) (weights - average)        after step n

    So it is the mean of the first ``1 / (1 - decay)`` steps, and exponential afterwards. A model in the place
    of several saves a decay of the rate (Polyak and Juditsky 1992; Izmailov et al., arXiv 1803.05407).
    Validation, checkpoints and exports have the average. A checkpoint holds the weights that train too, and a
    resumed run goes on from these.

    Args:
        decay: share of the average that a later step leaves.
    """

    @checked
    def __init__(self, decay: Share = 0.99) -> None:
        self.decay, self.steps = decay, 0
        self.average: dict[str, Tensor] = {}
        """The average by the name of the weight; empty before the first step."""

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Refuse what has no average, before anything is loaded.

        Raises:
            ConfigError: the weights are in parts, in 16 bits, or end in a pattern of zeros.
        """
        callbacks = {type(each).__name__ for each in getattr(trainer, "callbacks")}  # noqa: B009 (mypy)
        strategy, precision = kind(trainer.strategy), str(trainer.precision)
        reasons = {
            f"trainer.strategy: '{strategy}' shards the weights": strategy in SHARDED,
            f"trainer.precision: '{precision}' rounds a step of the average away": precision.endswith(
                "16-true"
            ),
            "Sparsify: its zeros are those of the last step, and an average has none": "Sparsify"
            in callbacks,
        }
        if found := [reason for reason, holds in reasons.items() if holds]:
            raise ConfigError(f"AveragedWeights: {found[0]}. Leave one of the two out.")

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.steps:  # gradients of further batches are still to come
            return
        self.steps = trainer.global_step
        share = max(1 / self.steps, 1 - self.decay)
        for name, weight in trained(module).items():
            self.average.setdefault(name, torch.zeros_like(weight)).lerp_(weight, share)

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.exchange(module)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.exchange(module)

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Leave the average in the module, after the last checkpoint."""
        self.exchange(module)

    def exchange(self, module: LightningModule) -> None:
        """Put the average into the module and keep what was there, or the other way round."""
        for name, weight in trained(module).items() if self.average else ():
            weight.data, self.average[name] = self.average[name], weight.data

    def on_save_checkpoint(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        own = trained(module) if self.average else {}
        checkpoint[TRAINED] = {"steps": self.steps, "weights": {name: x.detach() for name, x in own.items()}}
        names = {weight.data_ptr(): name for name, weight in own.items()}
        weights = checkpoint["state_dict"]
        for key, weight in weights.items():  # a tied one is there twice
            if name := names.get(weight.data_ptr()):
                weights[key] = self.average[name]

    @torch.no_grad()
    def on_load_checkpoint(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on from the weights that trained; the module has the average by now."""
        before = checkpoint.get(TRAINED, {"steps": trainer.global_step, "weights": {}})
        self.steps = before["steps"]
        for name, weight in trained(module).items():
            if name in before["weights"]:
                self.average[name] = weight.clone()
                weight.copy_(before["weights"][name])


def trained(module: LightningModule) -> dict[str, Tensor]:
    """Return the weights of a module that train, by name."""
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
