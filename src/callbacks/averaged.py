"""Average the weights of a recovery over its steps; what is validated and exported is the average."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from src.errors import ConfigError
from src.ranges import Share, checked
from src.training.checkpoints import UNAVERAGED
from src.training.strategies import SHARDED, kind


class AveragedWeights(Callback):
    """Keeps a moving average of the weights that train. They themselves train as they would without it.

        average += max(1 / n, 1 - decay) (weights - average)        after the n-th step that it sees

    So it is the mean of the first ``1 / (1 - decay)`` steps, and exponential afterwards. A model in the place
    of several saves a decay of the rate (Polyak and Juditsky 1992; Izmailov et al., arXiv 1803.05407).
    Validation, tests, checkpoints and exports have the average. A checkpoint holds the weights that train
    too, and a resumed run goes on from these; one of Lightning's with ``save_weights_only`` holds them alone.

    Args:
        decay: share of the average that a later step leaves.
    """

    @checked
    def __init__(self, decay: Share = 0.99) -> None:
        self.decay, self.seen, self.step = decay, 0, 0
        self.average: dict[str, Tensor] = {}
        """The average by the name of the weight; empty before the first step."""

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Refuse what has no average, before anything is loaded.

        Raises:
            ConfigError: the stage is no plain recovery, or its weights are in parts, in 16 bits, or end in a
                pattern of zeros.
        """
        callbacks = {type(each).__name__ for each in getattr(trainer, "callbacks")}  # noqa: B009 (mypy)
        strategy, precision, model = kind(trainer.strategy), str(trainer.precision), type(module).__name__
        reasons = {
            f"model: '{model}' is not src.recover.Recovery, whose weights stay the same ones": (
                model != "Recovery"
            ),
            f"trainer.strategy: '{strategy}' shards the weights": strategy in SHARDED,
            f"trainer.precision: '{precision}' rounds a step of the average away": precision.endswith(
                "16-true"
            ),
            "Sparsify: its zeros are those of the last step, and an average has none": "Sparsify"
            in callbacks,
        }
        if found := [reason for reason, holds in reasons.items() if holds]:
            raise ConfigError(f"AveragedWeights: {found[0]}. Leave one of the two out.")

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Refuse weights of 16 bits.

        Raises:
            ConfigError: some weight that trains has them.
        """
        if types := {str(weight.dtype) for weight in trained(module).values() if weight.itemsize < 4}:
            raise ConfigError(
                f"AveragedWeights: model.dtype gives weights in {', '.join(types)}, which round a step "
                f"of the average away. Set it to float32; trainer.precision bf16-mixed is as fast."
            )

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:  # gradients of further batches are still to come
            return
        self.step, self.seen = trainer.global_step, self.seen + 1
        share = max(1 / self.seen, 1 - self.decay)
        for name, weight in trained(module).items():
            self.average.setdefault(name, torch.zeros_like(weight)).lerp_(weight, share)

    def on_test_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.exchange(module)

    def on_test_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.exchange(module)

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
        checkpoint[UNAVERAGED] = {"seen": self.seen, "weights": {name: x.detach() for name, x in own.items()}}
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
        before = checkpoint.get(UNAVERAGED, {"seen": 0, "weights": {}})  # of a run that did not average yet
        self.seen, self.step = before["seen"], checkpoint["global_step"]
        for name, weight in trained(module).items():
            if name in before["weights"]:
                self.average[name] = weight.clone()
                weight.copy_(before["weights"][name])


def trained(module: LightningModule) -> dict[str, Tensor]:
    """Return the weights of a module that train, by name."""
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
