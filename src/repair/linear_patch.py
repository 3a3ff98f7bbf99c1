"""Repair the residual stream behind each gap of a cut model, in weights that it has, without training.

A gap is where layers were removed between two kept ones. :mod:`src.repair.stream` says what LinearPatch
(arXiv 2505.24680) computes there. :mod:`src.repair.fold` says why a stock model cannot hold that exactly, and
how its weights come near it. This module runs both on the calibration rows:

    repairs = LinearPatch("rows.jsonl")(student, parent, mask, tokenizer)

changes the cut ``student`` in place; its class, shapes and keys stay what they are.
``python -m src.cli patch`` exports such a model; ``src.recover.Recovery(patch=...)`` starts from one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any, Literal, cast, get_args

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from src.data.batches import Batch, supervised
from src.errors import ConfigError, did_you_mean
from src.losses.distill import Distillation
from src.losses.signals import live_signal
from src.mask import WIDE, Mask
from src.models.head import OutputHead
from src.models.streams import inputs
from src.ranges import Natural, NonNegative, Positive, checked
from src.repair.base import CutRepair
from src.repair.fold import Repair, fold
from src.repair.stream import Junction, Mode, StreamRepair, junctions, matrices, repaired, run
from src.training.progress import track

Goal = Literal["parent", "rotate", "diag"]
TOP = 50
"""Tokens of the teacher's signal when P alone is distilled."""


class LinearPatch(CutRepair):
    """Folds a repair of the residual stream into the layer before each gap.

    Args:
        data: calibration rows: JSONL, Parquet, text or a Hub id. None, in a recovery, is the first source of
            the text that it trains on.
        goal: the stream that the layer before a gap should leave: the ``parent``'s own behind the gap, or
            LinearPatch's ``h P``, with the Hadamard rotation (``rotate``) or without (``diag``).
        ridge: pull towards the present weights, relative to the power of each feature.
        distill_steps: batches on which P alone is distilled before it is folded; not with ``parent``.
        lr: learning rate of that distillation (AdamW, cosine to a twentieth).
        kwargs: which rows are read, and how; see :class:`src.repair.base.CutRepair`.
    """

    @checked
    def __init__(
        self,
        data: str | None = None,
        goal: Goal = "parent",
        ridge: NonNegative = 0.1,
        distill_steps: Natural = 0,
        lr: Positive = 1e-4,
        **kwargs: Any,
    ) -> None:
        super().__init__(data, **kwargs)
        accepted = get_args(Goal)
        if goal not in accepted:
            raise ConfigError(f"patch.goal: '{goal}' is none of {accepted}.{did_you_mean(goal, accepted)}")
        if goal == "parent" and distill_steps:
            raise ConfigError(
                "patch.distill_steps: there is no P to distil with goal 'parent'. Set it to 0, or goal to "
                "'rotate' or 'diag'."
            )
        self.goal, self.ridge, self.distill_steps, self.lr = goal, ridge, distill_steps, lr

    def refuse(self, mask: Mask) -> None:
        """Refuse a mask that removes no layers, and so leaves no gap.

        Raises:
            ConfigError: the mask is of KV groups or channels.
        """
        if mask.wide:
            raise ConfigError(
                f"patch: it repairs the stream behind removed layers, and a mask of {WIDE[mask.unit]} "
                f"removes none. Export the cut without it."
            )

    @property
    def fitted(self) -> str:
        towards = {"parent": "the parent's stream", "rotate": "h P, P = H diag(d) H^T", "diag": "h diag(d)"}
        trained = f" (P distilled for {self.distill_steps} steps)" if self.distill_steps else ""
        return f"last map of the layer before each gap fitted to {towards[self.goal]}{trained}"

    def __call__(
        self,
        student: PreTrainedModel,
        parent: PreTrainedModel,
        mask: Mask,
        tokenizer: PreTrainedTokenizerBase,
    ) -> list[Repair]:
        self.repairs = []
        if not junctions(mask):
            rank_zero_warn(f"patch: {mask} has no gap between two kept layers, so nothing is repaired.")
            return []
        return super().__call__(student, parent, mask, tokenizer)

    def repair(
        self, student: PreTrainedModel, parent: PreTrainedModel, mask: Mask, calibration: Sequence[Batch]
    ) -> list[Repair]:
        """Fold a repair into the layer before each gap; return the outcome of each."""
        places, repairs = junctions(mask), list[StreamRepair]()
        if self.goal != "parent":
            repairs = self.stream_repairs(student, parent, places, calibration)
        return self.fold(student, parent, places, calibration, repairs)

    def stream_repairs(
        self,
        student: PreTrainedModel,
        parent: PreTrainedModel,
        places: Sequence[Junction],
        calibration: Sequence[Batch],
    ) -> list[StreamRepair]:
        """Return, for each gap, the map ``h -> h P`` that LinearPatch puts there, as a module.

        P is estimated on the calibration rows, and distilled further if ``distill_steps`` is not 0. The
        student's weights do not change: :meth:`fold` puts the maps into them, and
        :func:`src.repair.stream.repaired` runs the student with the maps as hooks. ``goal`` must be
        ``rotate`` or ``diag``.

        Args:
            student: the cut model; distilling sets its ``requires_grad`` to false.
            parent: the whole model.
            places: the gaps of the cut.
            calibration: batches, as :meth:`calibration` gives.
        """
        matrices_JHH = matrices(parent, places, calibration, cast(Mode, self.goal))
        repairs = [StreamRepair(matrix_HH).to(student.device) for matrix_HH in matrices_JHH]
        if self.distill_steps:
            distil(student, parent, places, repairs, calibration, self.distill_steps, self.lr)
        return repairs

    def fold(
        self,
        student: PreTrainedModel,
        parent: PreTrainedModel,
        places: Sequence[Junction],
        calibration: Sequence[Batch],
        repairs: Sequence[StreamRepair],
    ) -> list[Repair]:
        """Fold one gap after another into the student, each on the stream that the folds before it leave.

        Args:
            student: the cut model, changed in place.
            parent: the whole model.
            places: the gaps of the cut.
            calibration: batches.
            repairs: the map P of each gap; empty if the stream should be the parent's.
        """
        folds = []
        for number, place in enumerate(places):
            with inputs(parent, {place.end: ""}) as entering:

                def target(batch: Batch, h_BTH: Tensor, number: int = number) -> Tensor:
                    if repairs:
                        return cast(Tensor, repairs[number](h_BTH))
                    run(parent, batch, places[number].end)
                    return entering[places[number].end]

                folds.append(fold(student, place.before, calibration, target, self.ridge))
        return folds


def distil(
    student: PreTrainedModel,
    parent: PreTrainedModel,
    places: Sequence[Junction],
    repairs: Sequence[StreamRepair],
    calibration: Sequence[Batch],
    steps: int,
    lr: float,
) -> None:
    """Train the matrices of the stream repairs in place, by distillation from the parent.

    Both models stay frozen. As in LinearPatch: a free ``H x H`` matrix at each gap, the KL between both
    distributions renormalised on the parent's top 50 tokens, AdamW with weight decay 1e-4, cosine to a
    twentieth of ``lr``.

    Args:
        student: the cut model.
        parent: the whole model, which teaches.
        places: the gaps of the cut.
        repairs: one for each gap; trained in place.
        calibration: batches, taken in a fixed shuffled order, again and again.
        steps: batches to train on.
        lr: learning rate at the start.
    """
    student.requires_grad_(False)
    parameters = [repair.matrix.requires_grad_(True) for repair in repairs]
    loss = Distillation(k=TOP, rule="renormalise", weight="none")
    own, teacher = OutputHead(student), OutputHead(parent)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-4)
    schedule = CosineAnnealingLR(optimizer, steps, eta_min=lr / 20)
    order = random.Random(0).sample(list(calibration), len(calibration))
    with repaired(student, places, repairs):
        for batch in track(islice(cycle(order), steps), "steps of the repair", steps):
            fed = {key: value.to(student.device) for key, value in batch.items()}
            index_N = supervised(fed["labels"])
            with torch.no_grad():
                signal = live_signal(teacher, teacher.at(fed, index_N), TOP)
            hidden_NH = own.at(fed, index_N)
            loss(own, hidden_NH, fed["labels"].flatten()[index_N + 1], signal)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    for parameter in parameters:
        parameter.requires_grad_(False)
