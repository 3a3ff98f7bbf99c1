"""Choose a mask by what recovery makes of it: short recoveries that race, half of them dropped each round.

Below some divergence the cut's own KL no longer tells which mask recovers best. So the best masks of a search
and one contiguous block are cut, distilled for a few steps on rows that the search has read, and measured on
its calibration rows; the better half goes on with twice as many steps, until one is left (successive halving,
arXiv 1502.07943). DarwinLM (arXiv 2502.07780) lets fewer and fewer offspring train longer in this way. Each
round starts from the cut, so one student at a time is in memory, and its learning rate falls to its end.

All of it counts in the forward tokens of the search: the pass back of a student counts as two forward.

Shapes: N supervised positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from typing import Annotated

import torch
from lightning import Trainer
from torch.optim.lr_scheduler import CosineAnnealingLR

from src.data.batches import Batch, Supervised, real_tokens
from src.errors import ConfigError
from src.losses.signals import Signal
from src.models.cut import cut
from src.models.head import OutputHead
from src.policies.base import MaskPolicy
from src.policies.probe import CalibrationProbe
from src.ranges import Count, Positive, Range, checked
from src.training.progress import track
from src.training.ranks import WholeBatch, total, world
from src.training.strategies import kind
from src.units.spaces import Kept

Taught = tuple[Supervised, Signal]
"""Rows, and what the teacher says of them."""


class Race:
    """Lets masks recover for a short time, and chooses the one that recovers best.

    Args:
        runners: masks in the first round.
        steps: optimiser steps of the first round; each further round has twice as many.
        lr: highest learning rate of AdamW.
    """

    @checked
    def __init__(
        self, runners: Annotated[int, Range(int, 2, 64)] = 8, steps: Count = 8, lr: Positive = 5e-4
    ) -> None:
        self.runners, self.steps, self.lr = runners, steps, lr

    @property
    def batches(self) -> int:
        """Most batches that a runner reads: one for each step of the last round."""
        return int(self.steps * 2 ** ((self.runners - 1).bit_length() - 1))

    def refuse(self, trainer: Trainer, quantize: str | None, adapted: bool) -> None:
        """Refuse weights that cannot be cut and trained.

        Raises:
            ConfigError: names what is in the way.
        """
        reasons = {
            f"model.quantize '{quantize}' holds weights that cannot be cut": quantize is not None,
            "model.adapters train weights beside the model's": adapted,
            "FSDP2 divides the weights among the ranks": kind(trainer.strategy) == "fsdp2",
        }
        if found := [reason for reason, holds in reasons.items() if holds]:
            raise ConfigError(f"model.race: it cuts and trains the model, and {found[0]}. Set it to null.")

    def __call__(
        self, probe: CalibrationProbe, policy: MaskPolicy, batches: Sequence[Batch]
    ) -> tuple[Kept, dict[str, float]]:
        """Return the kept units of the winner, and figures for the mask file.

        Args:
            probe: has measured the masks of the search; judges the recovered ones.
            policy: the policy at the end of its run.
            batches: rows that the search has read.
        """
        search, steps, values = probe.search, self.steps, dict[Kept, float]()
        field, before = self.contenders(probe, policy), search.forward_tokens
        moved = (search.transfer_batch_to_device(batch, search.device, 0) for batch in batches)
        rows = [Supervised.of(batch) for batch in moved]
        taught = [(each, search.teacher_signal(each)) for each in rows]
        while len(field) > 1:
            racing = track(field, f"recoveries of {steps} steps")
            values = {kept: self.recovered(probe, kept, taught, steps) for kept in racing}
            field = sorted(field, key=values.__getitem__)[: (len(field) + 1) // 2]
            steps *= 2
        (winner,) = field
        figures = {"kl_recovered": values[winner]} if values else {}  # none where one mask ran alone
        figures["kl"] = probe.divergence(policy.gates(winner))
        return winner, {**figures, "race_forward_tokens": search.forward_tokens - before}

    def contenders(self, probe: CalibrationProbe, policy: MaskPolicy) -> list[Kept]:
        """Return the masks of least divergence among the measured, and the contiguous one of most worth."""
        hard = {
            tuple(unit for unit, gate in enumerate(gates) if gate): value
            for gates, value in probe.measured().items()
            if {*gates} <= {0.0, 1.0}
        }
        best = [kept for kept in sorted(hard, key=hard.__getitem__) if policy.space.legal(kept)]
        worth, (units, keep) = policy.worth(), (policy.space.units, policy.space.keep)
        blocks = [(*range(at), *range(at + units - keep, units)) for at in range(keep + 1)]
        legal = [kept for kept in blocks if policy.space.legal(kept)]
        block = sorted(legal, key=lambda kept: -sum(worth[unit] for unit in kept))[:1]
        return [*[kept for kept in best if kept not in block][: self.runners - len(block)], *block]

    def recovered(self, probe: CalibrationProbe, kept: Kept, taught: Sequence[Taught], steps: int) -> float:
        """Return the divergence of a mask after so many steps of recovery, from the cut."""
        search, loss = probe.search, probe.search.distillation
        mask = search.mask(kept, {})
        student = cut(search.head.model, mask).float().requires_grad_(True)
        head, weights = OutputHead(student), list(student.parameters())
        optimizer = torch.optim.AdamW(weights, lr=self.lr, betas=(0.9, 0.95), weight_decay=0.0)
        schedule = CosineAnnealingLR(optimizer, steps)
        with torch.enable_grad():
            for rows, signal in islice(cycle(taught), steps):
                whole = WholeBatch(len(rows), real_tokens(rows.batch), search.device)
                hidden_NH = head.at(rows.batch, rows.index_N)
                loss(head, hidden_NH, rows.labels_N, signal, whole)["loss"].backward()
                for weight in weights if world() > 1 else ():
                    if weight.grad is not None:
                        weight.grad = total(weight.grad) / world()
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                search.spent(rows.batch, 3 * mask.depth)
        return probe.judged(student)
