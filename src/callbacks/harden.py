"""Harden the learned mask, choose and polish it on held-out rows, write ``mask.json``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from src.probe import CalibrationProbe

if TYPE_CHECKING:
    from src.search import MaskSearch

Keep = tuple[int, ...]
Measure = Callable[[Keep, bool], float]


class HardenMask(Callback):
    """Starts the policy from calibration rows and ends it with a mask file.

    The mask with the highest logits is the method's own answer. More search does not always mean a better
    mask (the paper's own budget table is not monotone), so the last distinct masks are measured on held-out
    rows and the best is taken; then single swaps of a removed and a kept layer are tried until none helps.
    All of it counts in the budget.

    Args:
        path: where to write the mask; None is ``mask.json`` in the run's log directory.
        candidates: how many of the last distinct hardened masks compete; 1 is the plain answer.
        polish: try single swaps.
    """

    def __init__(self, path: str | None = None, candidates: int = 4, polish: bool = True) -> None:
        self.path, self.candidates, self.polish = path, candidates, polish
        self.recent: list[Keep] = []

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        search = cast("MaskSearch", module)
        if trainer.global_step == 0:
            search.policy.initialise(CalibrationProbe(search))

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        keep = cast("MaskSearch", module).policy.harden()
        if keep in self.recent:
            self.recent.remove(keep)
        self.recent = [*self.recent, keep][-self.candidates :]

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.interrupted:
            return
        search = cast("MaskSearch", module)
        policy, probe = search.policy, CalibrationProbe(search)

        def measure(keep: Keep, quick: bool = False) -> float:
            return probe.divergence(policy.gates(keep), quick)

        learned = policy.harden()
        assert len(learned) == policy.num_layers - policy.target, "a policy must harden to the exact count"
        soft = probe.divergence(policy.keep_probabilities().to(policy.logits))
        best = min([*reversed(self.recent), learned], key=measure)
        chosen = polish(best, policy.free, measure) if self.polish else best
        metrics = {
            "kl": measure(chosen),
            "kl_learned": measure(learned),
            "kl_best_candidate": measure(best),
            "kl_soft": soft,
            "hard_soft_gap": measure(learned) - soft,
            "layer_forwards": float(search.layer_forwards),
        }
        mask = search.mask(chosen, metrics)
        for key, value in metrics.items():
            for logger in trainer.loggers:
                logger.log_metrics({f"mask/{key}": value}, trainer.global_step)
        if trainer.is_global_zero:
            path = Path(self.path or Path(trainer.log_dir or ".") / "mask.json")
            mask.save(path)
            rank_zero_info(f"{mask}; held-out KL {metrics['kl']:.4f}, written to {path}")

    def state_dict(self) -> dict[str, Any]:
        return {"recent": self.recent}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.recent = [tuple(keep) for keep in state_dict["recent"]]


def polish(keep: Keep, free: list[int], measure: Measure, finalists: int = 8) -> Keep:
    """Swap one removed for one kept layer while that lowers ``measure``; steepest swap first.

    Divergence is heavy-tailed over rows, so a few rows cannot tell good masks apart, but they can drop bad
    ones: all swaps race on the quick rows, and only the finalists are measured on all of them.

    Args:
        keep: kept layers to start from.
        free: layers that may be removed.
        measure: what to lower, ``(keep, quick) -> value``.
        finalists: swaps measured on all rows in each round.
    """
    while True:
        removed = [i for i in free if i not in keep]
        swaps = [tuple(sorted({*keep, back} - {out})) for back in removed for out in keep if out in free]
        race = sorted(swaps, key=lambda swap: measure(swap, True))[:finalists]
        best = min(race, key=lambda swap: measure(swap, False), default=keep)
        if measure(best, False) >= measure(keep, False):
            return keep
        keep = best
