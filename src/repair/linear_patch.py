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
from typing import Literal, cast, get_args

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from src.data.batches import Batch, supervised
from src.data.columns import Columns
from src.data.judging import batches, judged, read_rows
from src.errors import ConfigError, did_you_mean
from src.losses.distill import Distillation
from src.losses.signals import live_signal
from src.mask import WIDE, Mask
from src.models.head import OutputHead
from src.models.positions import position_limit
from src.ranges import Count, Natural, NonNegative, Positive, checked
from src.repair.fold import Repair, fold
from src.repair.stream import Junction, Mode, StreamRepair, inputs, junctions, matrices, repaired, run
from src.training.progress import track

Goal = Literal["parent", "rotate", "diag"]
TOP = 50
"""Tokens of the teacher's signal when P alone is distilled."""


class LinearPatch:
    """Folds a repair of the residual stream into the layer before each gap.

    Args:
        data: calibration rows: JSONL, Parquet, text or a Hub id.
        goal: the stream that the layer before a gap should leave: the ``parent``'s own behind the gap, or
            LinearPatch's ``h P``, with the Hadamard rotation (``rotate``) or without (``diag``).
        rows: largest number of calibration rows that are read.
        columns: columns of these rows; None looks for well-known names.
        split: split of a Hub or saved dataset; None is the only one that it has.
        max_length: tokens after which a row is cut off.
        batch_size: rows at once.
        ridge: pull towards the present weights, relative to the power of each feature.
        distill_steps: batches on which P alone is distilled before it is folded; not with ``parent``.
        lr: learning rate of that distillation (AdamW, cosine to a twentieth).
        device: where to compute; None is cuda if there is one.
    """

    @checked
    def __init__(
        self,
        data: str,
        goal: Goal = "parent",
        rows: Count = 256,
        columns: Columns | None = None,
        split: str | None = None,
        max_length: Count = 1024,
        batch_size: Count = 8,
        ridge: NonNegative = 0.1,
        distill_steps: Natural = 0,
        lr: Positive = 1e-4,
        device: str | None = None,
    ) -> None:
        accepted = get_args(Goal)
        if goal not in accepted:
            raise ConfigError(f"patch.goal: '{goal}' is none of {accepted}.{did_you_mean(goal, accepted)}")
        if goal == "parent" and distill_steps:
            raise ConfigError(
                "patch.distill_steps: there is no P to distil with goal 'parent'. Set it to 0, or goal to "
                "'rotate' or 'diag'."
            )
        self.data, self.goal, self.rows, self.columns = data, goal, rows, columns or Columns()
        self.split = split
        self.max_length, self.batch_size, self.ridge = max_length, batch_size, ridge
        self.distill_steps, self.lr = distill_steps, lr
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.repairs: list[Repair] = []
        self.used = f"{rows} rows"

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

    def __str__(self) -> str:
        if not self.repairs:
            return "nothing is repaired"
        towards = {"parent": "the parent's stream", "rotate": "h P, P = H diag(d) H^T", "diag": "h diag(d)"}
        trained = f" (P distilled for {self.distill_steps} steps)" if self.distill_steps else ""
        errors = ", ".join(f"{r.module} {r.before:.2g} -> {r.after:.2g}" for r in self.repairs)
        fitted = f"last map of the layer before each gap fitted to {towards[self.goal]}{trained}"
        return f"{fitted} on {self.used}; squared relative error: {errors}"

    def __call__(
        self,
        student: PreTrainedModel,
        parent: PreTrainedModel,
        mask: Mask,
        tokenizer: PreTrainedTokenizerBase,
    ) -> list[Repair]:
        """Repair the cut model in place; return the outcome of each fold, one for each gap.

        Args:
            student: the cut model, with the parent's weights.
            parent: the whole model.
            mask: names the kept layers.
            tokenizer: the parent's.

        Raises:
            ConfigError: the rows cannot be read, or a layer of this family has no weights to fold into.
        """
        self.repairs, places = [], junctions(mask)
        if not places:
            rank_zero_warn(f"patch: {mask} has no gap between two kept layers, so nothing is repaired.")
            return []
        calibration = self.calibration(tokenizer, position_limit(parent))
        models = (student, parent)
        homes = [model.device for model in models]
        try:
            for model in models:
                nn.Module.to(model, self.device)
            repairs = (
                self.stream_repairs(student, parent, places, calibration) if self.goal != "parent" else []
            )
            self.repairs = self.fold(student, parent, places, calibration, repairs)
        finally:
            for model, home in zip(models, homes, strict=True):
                nn.Module.to(model, home)
        return self.repairs

    def calibration(self, tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> list[Batch]:
        """Return the calibration rows as padded batches, every token supervised.

        Args:
            tokenizer: of the model.
            limit: tokens that the model can read in a row, after which a row is cut off; None is no limit.

        Raises:
            ConfigError: there are no rows.
        """
        read = read_rows(self.data, self.rows, self.split)
        length = min(self.max_length, limit or self.max_length)
        rows = judged(tokenizer, read, self.columns, "all", length)
        if not rows.rows:
            raise ConfigError(f"patch.data: '{self.data}' gives no row of two tokens or more.")
        self.used = f"{rows} ({sum(len(row.ids) for row in rows.rows):,} tokens)"
        return list(batches(rows.rows, self.batch_size, tokenizer.pad_token_id or 0))

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
            with inputs(parent, [place.end]) as entering:

                def target(batch: Batch, h_BTH: Tensor, number: int = number) -> Tensor:
                    if repairs:
                        return cast(Tensor, repairs[number](h_BTH))
                    run(parent, batch)
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
