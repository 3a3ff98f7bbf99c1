"""End a search with ``mask.json``: take the policy's final mask, improve it on held-out rows, write it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from src.callbacks.record import check_path
from src.data.batches import Batch
from src.mask import Mask
from src.policies.measuring import Probe
from src.policies.probe import PREFIX_GIB, CalibrationProbe
from src.policies.settle import settle
from src.ranges import NonNegative, checked
from src.training.adapters import beside
from src.units.amount import Budget
from src.units.spaces import Kept

if TYPE_CHECKING:
    from src.search import MaskSearch


Final = Callable[[], tuple[Kept, dict[str, float]]]
"""Replaces the mask that was chosen; returns figures besides."""


def answers(search: MaskSearch) -> Iterator[tuple[Budget, Kept]]:
    """Yield what the policy would keep now, for each budget."""
    for budget in search.budgets:
        with search.aimed(budget):
            yield budget, search.policy.harden()


def choose(
    search: MaskSearch, probe: Probe, recent: Sequence[Kept], final: Final | None = None
) -> Iterator[tuple[Budget, Kept, dict[str, float]]]:
    """Choose the final mask of each budget on held-out rows, that of the largest removal first.

    A budget says how many units go; a search for several sizes has several.

    Args:
        search: the search, at the end of its run.
        probe: measures masks.
        recent: distinct masks that the policy gave as its answer, of all budgets.
        final: has the last word on each budget's mask; None leaves it as it is.

    Yields:
        A budget, the units that its mask keeps, and the figures to write into its mask file.
    """
    policy, held = search.policy, tuple[int, ...]()
    for budget in reversed(search.budgets):
        with search.aimed(budget, held):
            chosen, figures = settle(policy, probe, [kept for kept in recent if policy.space.legal(kept)])
            if final is not None:
                chosen, more = final()
                figures |= more
        held = chosen if search.nested else ()
        yield budget, chosen, figures


class HardenMask(Callback):
    """Initialises the policy before the first step, and writes its final mask to a file after the last.

    The final mask is the policy's own answer (``policy.harden()``), unless the policy asks for more. With
    ``candidates`` its last distinct answers compete on held-out rows, and its first: a short search of a deep
    model may end behind its start. With ``polish`` single swaps of a kept and a removed unit are tried until
    none helps. A search may let the masks that were measured best race through short recoveries
    (:class:`src.policies.race.Race`). ``forward_tokens`` in the file counts all of this.

    A search for several sizes writes a file for each, such as ``mask-0.25.json``; ``mask.json`` is then the
    mask of the largest removal.

    Args:
        path: where to write the mask; None is ``mask.json`` in the run's log directory.
        prefix_gib: memory (GiB) in which layers' outputs are remembered while masks are measured. The pass
            that measures a mask then starts at its first removed unit, not at the first layer, with the same
            result; 0 remembers none.
    """

    @checked
    def __init__(self, path: str | None = None, prefix_gib: NonNegative = PREFIX_GIB) -> None:
        self.path, self.prefix_gib = path, prefix_gib
        self.first: list[Kept] = []
        """What the policy would keep before its first step, of each budget."""
        self.recent: list[Kept] = []
        self.rows: list[Batch] = []
        """Rows for a race at the end, the first that are read."""

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        check_path(self, self.path)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        search = cast("MaskSearch", module)
        if trainer.global_step == 0:
            search.policy.initialise(CalibrationProbe(search, self.prefix_gib))
            if search.policy.candidates > 1:
                self.first = [kept for _, kept in answers(search)]

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        search = cast("MaskSearch", module)
        if search.race is not None and len(self.rows) < search.race.batches:
            self.rows.append({key: value.cpu() for key, value in batch.items()})
        for _, kept in answers(search):
            same_size = [other for other in self.recent if len(other) == len(kept)]
            others = [other for other in self.recent if len(other) != len(kept)]
            newest = [*(other for other in same_size if other != kept), kept]
            self.recent = others + newest[-search.policy.candidates :]

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.interrupted:
            return
        search = cast("MaskSearch", module)
        probe, curve = CalibrationProbe(search, self.prefix_gib), list[dict[str, Any]]()
        final = None if search.race is None else partial(search.race, probe, search.policy, self.rows)
        for budget, kept, figures in list(choose(search, probe, [*self.first, *self.recent], final)):
            if search.adapters is not None:
                figures["kl_adapted"] = probe.adapted(search.policy.gates(kept))
            metrics = {**figures, "forward_tokens": search.forward_tokens}
            for key, value in metrics.items():
                for logger in trainer.loggers:
                    logger.log_metrics({f"mask/{key}{budget.suffix}": value}, trainer.global_step)
            written = self._write(trainer, search, budget, search.mask(kept, metrics))
            found = {"share": budget.share, "removed": budget.remove, "kl": metrics["kl"], "mask": written}
            curve.insert(0, found)
        if len(curve) > 1:
            search.figures["budgets"] = curve

    def _write(self, trainer: Trainer, search: MaskSearch, budget: Budget, mask: Mask) -> str:
        """Write the mask of a budget, and its adapters if it has any; return the name of the mask file."""
        last = Path(self.path or Path(trainer.log_dir or ".") / "mask.json")  # log_dir asks all ranks
        own = last.with_stem(last.stem + budget.suffix)
        for path in dict.fromkeys([own, *([last] if budget is search.budgets[-1] else [])]):
            if trainer.is_global_zero:
                mask.save(path)
                if search.adapters is not None:
                    search.adapters.save(beside(path), mask)
        rank_zero_info(f"{mask}; held-out KL {mask.metrics['kl']:.4f}, written to {own}")
        return own.name

    def state_dict(self) -> dict[str, Any]:
        return {"first": self.first, "recent": self.recent, "rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.recent = [tuple(kept) for kept in state_dict["recent"]]
        self.first = [tuple(kept) for kept in state_dict.get("first", ())]
        self.rows = list(state_dict.get("rows", ()))
