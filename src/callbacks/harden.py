"""Harden the learned mask, choose and polish it on held-out rows, write ``mask.json``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from src.policies.probe import CalibrationProbe

if TYPE_CHECKING:
    from src.search import MaskSearch

Keep = tuple[int, ...]
Measure = Callable[[Keep, bool], float]


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
        self.recent: list[Keep] = []

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        search = cast("MaskSearch", module)
        if trainer.global_step == 0:
            search.policy.initialise(CalibrationProbe(search))

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        policy = cast("MaskSearch", module).policy
        keep = policy.harden()
        if keep in self.recent:
            self.recent.remove(keep)
        self.recent = [*self.recent, keep][-policy.candidates :]

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
        chosen = polish(best, policy.free, measure, policy.logits.tolist()) if policy.polish else best
        metrics = {
            "kl": measure(chosen),
            "kl_learned": measure(learned),
            "kl_best_candidate": measure(best),
            "kl_soft": soft,
            "hard_soft_gap": measure(learned) - soft,
            "forward_tokens": search.forward_tokens,
        }
        mask = search.mask(chosen, metrics)
        for key, value in metrics.items():
            for logger in trainer.loggers:
                logger.log_metrics({f"mask/{key}": value}, trainer.global_step)
        path = Path(self.path or Path(trainer.log_dir or ".") / "mask.json")  # log_dir asks all ranks
        if trainer.is_global_zero:
            mask.save(path)
            rank_zero_info(f"{mask}; held-out KL {metrics['kl']:.4f}, written to {path}")

    def state_dict(self) -> dict[str, Any]:
        return {"recent": self.recent}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.recent = [tuple(keep) for keep in state_dict["recent"]]


def polish(
    keep: Keep, free: list[int], measure: Measure, worth: Sequence[float], swaps: int = 64, finalists: int = 8
) -> Keep:
    """Swap one removed for one kept layer while that lowers ``measure``; steepest swap first.

    A deep model has more swaps than are worth a look (768 where 16 of 64 layers go), so those race that the
    search itself finds likeliest. Divergence is heavy-tailed over rows, so a few rows cannot tell good masks
    apart, but they can drop bad ones: the race is run on the quick rows, and only the finalists are measured
    on all of them.

    Args:
        keep: kept layers to start from.
        free: layers that may be removed.
        measure: what to lower, ``(keep, quick) -> value``.
        worth: of keeping each layer, such as the policy's logits.
        swaps: swaps that race in each round, those that gain most worth first.
        finalists: swaps measured on all rows in each round.
    """
    while True:
        removed = [i for i in free if i not in keep]
        pairs = [(back, out) for back in removed for out in keep if out in free]
        pairs.sort(key=lambda pair: worth[pair[1]] - worth[pair[0]])
        racing = [tuple(sorted({*keep, back} - {out})) for back, out in pairs[:swaps]]
        race = sorted(racing, key=lambda swap: measure(swap, True))[:finalists]
        best = min(race, key=lambda swap: measure(swap, False), default=keep)
        if measure(best, False) >= measure(keep, False):
            return keep
        keep = best
