"""Judge soft prompts by what repairs learn from them: the divergence that is left on held-out rows.

Shapes: M prompts, T positions, H hidden, J gaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from src.data.batches import Batch, Supervised, real_tokens
from src.errors import ConfigError
from src.prompts.cuts import OneCut
from src.prompts.rows import embedded
from src.prompts.tiny import TinyRepair, lesson, signal
from src.prompts.windows import Inner
from src.training.ranks import WholeBatch, total, world
from src.training.stage import Stage

BATCHES = 4
"""Most batches of held-out rows by which prompts are judged."""
Taught = tuple[TinyRepair, Tensor]
"""A repair, and the factors that it has learned."""


class Judging(Stage):
    """The part of the stage that judges prompts.

    Attributes:
        cuts: those that are repaired.
        inner: how their repairs are trained.
        sets: tokens and mask of each set of rows that the prompts may start from.
        prompts: ``[M, T, H]``.
        mask_MT: which of their positions are not padding.
    """

    cuts: OneCut
    inner: Inner
    sets: list[tuple[Tensor, Tensor]]
    prompts: nn.Parameter
    mask_MT: Tensor

    def taught(self, embeds_MTH: Tensor, mask_MT: Tensor) -> list[Taught]:
        """Return the repairs by which prompts are judged, each with what it learns from them."""
        data = lesson(self.head, embeds_MTH.detach(), mask_MT)
        return [(repair, repair.learn(data, self.inner)) for repair in self.cuts.judges()]

    def divergence(self, batch: Batch, taught: Sequence[Taught]) -> tuple[Tensor, WholeBatch]:
        """Return the mean divergence of repaired cuts on a batch, and the batch of all ranks."""
        rows = Supervised.of(batch)
        whole, theirs = WholeBatch(len(rows), real_tokens(batch), self.device), signal(self.head, rows)
        losses = [repair.divergence(theta_JH, rows, theirs, whole) for repair, theta_JH in taught]
        return torch.stack(losses).mean(), whole

    @torch.no_grad()
    def judged(self, taught: Sequence[Taught]) -> float:
        """Return the divergence of repaired cuts on the first held-out batches of all ranks.

        Raises:
            ConfigError: there are none.
        """
        parts = list[tuple[float, int]]()
        for batch in islice(self.data.val_dataloader(), BATCHES):
            self.read.add(batch)
            loss, whole = self.divergence(self.transfer_batch_to_device(batch, self.device, 0), taught)
            parts.append((float(total(loss)) / world() * whole.positions, whole.positions))
        if not parts:
            raise ConfigError(
                "data.validation: prompts are judged by held-out rows. Name a file, or set data.held_out."
            )
        return sum(loss for loss, _ in parts) / sum(count for _, count in parts)

    def on_train_start(self) -> None:
        """Begin a new run with the set of rows that teaches the repairs most."""
        if self.trainer.global_step:
            return
        sets = [(ids_MT.to(self.device), mask_MT.to(self.device)) for ids_MT, mask_MT in self.sets]
        begun = [(embedded(self.head, ids_MT, mask_MT), mask_MT) for ids_MT, mask_MT in sets]
        scores = [self.judged(self.taught(*each)) for each in begun]
        best = min(range(len(sets)), key=scores.__getitem__)
        with torch.no_grad():
            self.prompts.copy_(begun[best][0])
            self.mask_MT.copy_(begun[best][1])
        cut = self.judged([(repair, repair.start) for repair in self.cuts.judges()])
        self.figures |= {"kl_cut": cut, "kl_starts": scores, "kl_start": scores[best]}
