"""Stop a stage at the first NaN or infinity, before it reaches a file."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from src.errors import ConfigError
from src.models.finite import not_finite


class FiniteOnly(Callback):
    """Stops a run whose loss, or whose weights at a checkpoint or at the end, are NaN or infinite.

    Every stage adds this callback itself, so no configuration can leave it out.
    """

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Stop the run if the loss of a batch is not finite.

        Raises:
            ConfigError: the loss is not finite; names the step and the last good checkpoint.
        """
        if not loss.isfinite():
            raise self._fault(trainer, f"the loss is {float(loss)}")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop the run if its last step left weights that are not finite, as no later loss will show.

        Raises:
            ConfigError: a weight is not finite; names the step, the weight and the last good checkpoint.
        """
        if trainer.global_step == trainer.max_steps or trainer.should_stop:
            self._check_weights(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Stop the run before weights that are not finite take the place of good ones.

        Raises:
            ConfigError: as :meth:`on_train_batch_end`.
        """
        self._check_weights(trainer, pl_module)

    def _check_weights(self, trainer: Trainer, module: LightningModule) -> None:
        if (name := not_finite(module)) is not None:
            raise self._fault(trainer, f"the weights '{name}' are not finite")

    @staticmethod
    def _fault(trainer: Trainer, what: str) -> ConfigError:
        saved = trainer.checkpoint_callback
        last = getattr(saved, "last_model_path", "") or getattr(saved, "best_model_path", "")
        kept = f"The last good checkpoint is '{last}'" if last else "No checkpoint was written"
        return ConfigError(
            f"step {trainer.global_step}: {what}; the run stops. {kept}. Lower the learning rate "
            f"(model.optimizer.lr), or look for rows and for a teacher that yield no number."
        )
