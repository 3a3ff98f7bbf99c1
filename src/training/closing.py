"""Close removed units slowly: a recovery that begins as the parent and ends as the cut.

A cut at once leaves a student far from its parent, from which it has to find back. Here the removed units
still run between the kept ones, frozen, behind gates that fall from 1 to 0 in the first part of the run; the
kept units learn meanwhile to do without them. Progressive pruning keeps more than one cut at equal tokens
(SlimQwen, arXiv 2605.08738), and pushing doomed layers towards the identity is what TRSP (ACL 2026) does
before its cut.

What is trained, saved and resumed is the cut model throughout (:mod:`src.models.opened`): once the gates are
at 0, it runs alone, and there is nothing to convert. Until then a step costs what one of the parent costs,
and the removed units' weights are in memory.
"""

from __future__ import annotations

from abc import ABC
from typing import Any

from lightning import Trainer

from src.data.batches import Batch
from src.errors import ConfigError
from src.mask import Mask
from src.models.opened import Opened
from src.ranges import Share, checked
from src.training.schedules import share_done, total_steps
from src.training.stage import Stage
from src.training.strategies import SHARDED, kind


class Closing(Stage, ABC):
    """A stage that may close the removed units of its student in the course of the run.

    Args:
        model: Hub id or directory of the parent.
        closing: share of the run during which they close, linearly; 0 removes them before the run.
        kwargs: how the parent is loaded; see :class:`src.training.stage.Stage`.
    """

    @checked
    def __init__(self, model: str, closing: Share = 0.0, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.closing = closing
        self.opened: Opened | None = None
        """The student with its removed units, until they are closed."""

    def check_closing(self, trainer: Trainer, mask: Mask, scope: str, patched: bool) -> None:
        """Refuse a slow closing where units cannot stand beside the student.

        Raises:
            ConfigError: names what is in the way.
        """
        reasons = {
            f"a mask of {mask.unit}s removes parts of layers": mask.wide,
            f"the strategy '{kind(trainer.strategy)}' shards the student": kind(trainer.strategy) in SHARDED,
            f"model.scope '{scope}' puts adapters in the place of its weights": scope == "lora",
            "model.patch repairs a cut, and there is none yet": patched,
            f"trainer.precision '{trainer.precision}' changes the type of its weights": (
                str(trainer.precision).endswith("16-true")
            ),
        }
        if found := [reason for reason, holds in reasons.items() if self.closing and holds]:
            raise ConfigError(
                f"model.closing: {self.closing} given, and {found[0]}. Set it to 0: the cut comes first."
            )

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Move the gates of the removed units; drop the units once these are closed."""
        super().on_train_batch_start(batch, batch_idx)
        if self.opened is None:
            return
        done = share_done(self.trainer, self.trainer.global_step + 1, total_steps(self.trainer))
        self.opened.gate = max(0.0, 1 - done / self.closing)
        self.log("train/open", self.opened.gate)
        if self.opened.gate == 0:
            self.opened = None
