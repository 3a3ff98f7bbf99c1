"""Harden the learned mask, choose and polish it on held-out rows, write ``mask.json``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from src.policies.polish import settle
from src.policies.probe import CalibrationProbe
from src.training.adapters import beside
from src.units.spaces import Kept

if TYPE_CHECKING:
    from src.search import MaskSearch


class HardenMask(Callback):
    """Starts the policy from calibration rows and ends it with a mask file.

    The policy's own answer is final unless it asks for more: that its last distinct masks compete on
    held-out rows (``candidates``), and that single swaps are tried until none helps (``polish``). All of it
    counts in the budget.

    Args:
        path: where to write the mask; None is ``mask.json`` in the run's log directory.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self.recent: list[Kept] = []

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        search = cast("MaskSearch", module)
        if trainer.global_step == 0:
            search.policy.initialise(CalibrationProbe(search))

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        policy = cast("MaskSearch", module).policy
        kept = policy.harden()
        if kept in self.recent:
            self.recent.remove(kept)
        self.recent = [*self.recent, kept][-policy.candidates :]

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.interrupted:
            return
        search = cast("MaskSearch", module)
        probe = CalibrationProbe(search)
        chosen, figures = settle(search.policy, probe, self.recent)
        if search.adapters is not None:
            figures["kl_adapted"] = probe.adapted(search.policy.gates(chosen))
        metrics = {**figures, "forward_tokens": search.forward_tokens}
        mask = search.mask(chosen, metrics)
        for key, value in metrics.items():
            for logger in trainer.loggers:
                logger.log_metrics({f"mask/{key}": value}, trainer.global_step)
        path = Path(self.path or Path(trainer.log_dir or ".") / "mask.json")  # log_dir asks all ranks
        if trainer.is_global_zero:
            mask.save(path)
            if search.adapters is not None:
                search.adapters.save(beside(path), mask)
            rank_zero_info(f"{mask}; held-out KL {metrics['kl']:.4f}, written to {path}")

    def state_dict(self) -> dict[str, Any]:
        return {"recent": self.recent}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.recent = [tuple(kept) for kept in state_dict["recent"]]
