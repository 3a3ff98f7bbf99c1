"""Recover what a cut has lost: distil the cut model from its parent.

The student is a plain, smaller Hugging Face model without gates. It learns from a teacher's signal, live or
cached. Its loss is a weighted sum of terms, of which the first is an entropy-weighted divergence. The teacher
is no submodule of the stage, so no checkpoint, optimiser or sharding engine holds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from src.data.batches import Batch, Supervised, real_tokens
from src.losses.distill import Distillation
from src.losses.objective import Objective, Weighted
from src.losses.terms import Pair, Step
from src.mask import Mask
from src.models.adapters import out_of_reach
from src.models.cut import cut
from src.models.head import OutputHead
from src.models.layers import num_layers
from src.models.loading import load_config, load_tokenizer
from src.models.opened import Opened
from src.models.sharding import shard
from src.models.streams import inputs, streams
from src.ranges import Count, Share, checked
from src.repair.base import CutRepair
from src.teachers import LiveTeacher, TeacherSource
from src.training import identity
from src.training.adapters import beside, check_saved, merged
from src.training.closing import Closing
from src.training.ranks import MicroBatches, WholeBatch
from src.training.schedules import Decay, share_done, total_steps, with_warmup
from src.training.scopes import Scope, check_scope, check_units, confine, recompute, scoped
from src.training.start import check_averaged, check_start, started
from src.training.strategies import check_device
from src.units.width import feed_forward_writers


class Recovery(Closing):
    """Trains the cut model to behave like its parent again.

    Args:
        mask: the ``mask.json`` of a search.
        model: Hub id or directory of the parent; None is the one that the mask names.
        teacher: source of the teacher's signal; None runs the parent live.
        distillation: divergence from that signal, the first term of the loss. Validation logs it as
            ``val/kl``, with the same ``k`` and ``rule``, at temperature 1, every token weighing the same.
        terms: further terms of the loss, each with a weight; see :class:`src.losses.Objective`.
        scope: what trains: all weights (``full``), the layers next to removed ones (``cut_adjacent``), or
            ``lora`` adapters on all linear maps (needs the extra ``lora``), which the export merges. Linear
            maps that adapters cannot reach stay frozen, and are named in the record.
        lora_rank: rank of the adapters.
        patch: what changes the cut model before it trains: a repair; ``adapters``, those that the mask's
            search trained and left beside the mask; or the checkpoint of an earlier recovery of this mask,
            whose weights it starts from. None starts from the parent's.
        optimizer: optimiser of the weights that train.
        warmup: share of the run during which the learning rate rises.
        final_lr: learning rate at the end, as a share of the highest.
        decay: shape of the learning rate's decay.
        kwargs: whether removed units close slowly; see :class:`src.training.closing.Closing`. And how the
            parent is loaded; the revision is by default the one that the mask names.
    """

    @checked
    def __init__(
        self,
        mask: str,
        model: str | None = None,
        teacher: TeacherSource | None = None,
        distillation: Distillation | None = None,
        terms: list[Weighted] | None = None,
        scope: Scope = "full",
        lora_rank: Count = 16,
        patch: CutRepair | str | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup: Share = 0.05,
        final_lr: Share = 0.1,
        decay: Decay = "cosine",
        **kwargs: Any,
    ) -> None:
        loaded = self.begin(mask)
        super().__init__(model or loaded.model, quantize=None, **kwargs)
        self.mask = loaded
        self.parent_key = identity.MODEL if model else identity.MASK
        theirs = loaded.revision if self.name == loaded.model else None
        self.loading = replace(self.loading, revision=self.revision or theirs)
        self.mask.check(num_layers(load_config(self.name, self.revision)), self.name)
        self.adapters = beside(mask) if patch == "adapters" else None
        self.teacher = teacher or LiveTeacher()
        self.objective = Objective(distillation, terms)
        self.distillation = self.objective.distillation
        self.scope, self.lora_rank = scope, lora_rank
        self.compared = [own for own, _ in self.objective.pairs(loaded)] if self.objective.local else None
        check_scope(scope, loaded, self.compared)
        self.start = patch if isinstance(patch, str) and patch != "adapters" else None
        self.patch = None if isinstance(patch, str) else patch
        self.before: str | None = None
        """What changed the cut model before its first step, in words."""
        if self.patch is not None:
            self.patch.refuse(loaded)
        self.done = 0.0
        """Share of the run that is over, which some term may ask for."""
        self.micro = MicroBatches()
        self.optimizer = optimizer
        self.warmup, self.final_lr, self.decay = warmup, final_lr, decay

    def begin(self, mask: str) -> Mask:
        """Return the mask by which the student is cut before its first step."""
        return Mask.load(mask)

    # ------------------------------------------------------------------ model

    def refuse(self, trainer: Trainer, data: object) -> None:
        check_device(trainer)
        self.teacher.refuse(trainer, data, self.distillation)
        if self.adapters is not None:
            check_saved(self.adapters, self.mask)
        if self.start is not None:
            check_start(self.start, self.mask)
        patched = any(each is not None for each in (self.patch, self.adapters, self.start))
        self.check_closing(trainer, self.mask, self.scope, patched)
        self.teacher.states([theirs for _, theirs in self.objective.pairs(self.mask)])
        _ = self.writers  # found now, so that a family without them is refused before it is loaded

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        parent = self.load()
        identity.check_parent(self.mask, self.name, self.weights, self.parent_key)
        if self.start is None:
            student = cut(parent, self.mask)
        else:
            student, self.before = started(parent, self.mask, self.start, self.weights)
        if self.adapters is not None:
            student = merged(student, self.mask, self.adapters)
        if self.patch is not None:
            self.patch(student, parent, self.mask, load_tokenizer(self.name, self.revision))
            self.before = str(self.patch) if self.patch.repairs else None
            self.read.unite([self.patch.read.sample])
        self.model = scoped(student, self.mask, self.scope, self.lora_rank)
        if self.compared is not None:
            confine(self.model, self.compared)
        self.frozen = out_of_reach(self.model) if self.scope == "lora" else ""
        if self.checkpoint_activations:
            recompute(self.model)
        self.head = OutputHead(self.model)
        if self.closing:
            self.opened = Opened(parent, self.model, self.mask, self.checkpoint_activations)
        if self.engine:
            self.check()
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh["data_parallel"])
        self.teacher.adopt(parent)

    def on_fit_start(self) -> None:
        """Check the output head and set up the teacher, now that the student is on its device."""
        if not self.engine:
            self.check()
        self.teacher.setup(self)
        if self.opened is not None:
            self.opened.to(self.device)

    def on_train_start(self) -> None:
        """Leave the mask in the run's directory, wherever it came from; a run without a logger has none."""
        directory = self.trainer.log_dir if self.trainer.loggers else None  # log_dir asks all ranks
        if directory and self.trainer.is_global_zero:
            self.mask.save(Path(directory) / identity.RECOVERS)

    @cached_property
    def writers(self) -> tuple[str, ...]:
        """For each layer of the student, the path of the linear map that ends its feed-forward.

        Empty if no term reads what enters these maps.
        """
        if not self.objective.activations:
            return ()
        paths = feed_forward_writers(load_config(self.name, self.revision))
        return tuple(paths[layer] for layer in self.mask.feed_forward)

    # ------------------------------------------------------------------ learning

    def step(self, rows: Supervised, whole: WholeBatch | None = None, pairs: Sequence[Pair] = ()) -> Step:
        """Run teacher and student on this rank's rows, and return what the terms of the loss may read.

        Args:
            rows: a batch and its supervised positions.
            whole: the batch of all ranks that it is a part of; None if it is on its own.
            pairs: layers of student and parent whose streams are collected, for terms that compare them.
        """
        batch, index_N = rows.batch, rows.index_N
        local = self.objective.local and bool(pairs)  # no logits of any position
        with self.teacher.states([theirs for _, theirs in pairs]) as parent:
            signal = self.teacher.signal(batch, index_N[:0] if local else index_N)
        opened = self.opened if self.training else None  # validation judges the cut
        runs = opened or self.head
        places = {own: own if opened is None else theirs for own, theirs in pairs}
        homes = range(len(self.writers)) if opened is None else self.mask.feed_forward
        ends = dict(zip(homes, self.writers, strict=False))
        behind = streams(runs.model, places.values(), apart=local)
        with behind as collected, inputs(runs.model, ends) as entering:
            hidden_NH = runs.hidden(batch).flatten(0, 1)[index_N]
        student = {own: collected[place] for own, place in places.items()}
        own = {position: entering[home] for position, home in enumerate(ends)}
        inner = [{i: x.flatten(0, -2)[index_N] for i, x in each.items()} for each in (student, parent, own)]
        return Step(self.head, hidden_NH, rows.labels_N, signal, self.mask, whole, *inner)

    def losses(self, rows: Supervised, whole: WholeBatch | None = None) -> dict[str, Tensor]:
        """Return the weighted sum of the terms as ``loss``, and the terms' figures by name.

        Args:
            rows: a batch and its supervised positions.
            whole: the batch of all ranks that it is a part of; None if it is on its own.
        """
        objective = self.objective.at(self.done)
        return objective(self.step(rows, whole, objective.pairs(self.mask)))

    def training_step(self, batch: Batch, index: int) -> Tensor:
        rows = Supervised.of(batch)
        whole = WholeBatch(len(rows), real_tokens(batch), self.device)
        if self.objective.timed and index % self.trainer.accumulate_grad_batches == 0:
            self.done = share_done(self.trainer, self.trainer.global_step, total_steps(self.trainer))
        figures = self.losses(rows, whole)
        self.tokens += whole.tokens
        logged = {f"train/{key}": value.detach() for key, value in figures.items()}
        self.log_dict(logged, prog_bar=True, sync_dist=True)
        return self.micro.weigh(figures["loss"], whole.share) if self._accumulates else figures["loss"]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._accumulates:
            self.micro.settle(self.model.parameters(), self.trainer.accumulate_grad_batches)

    @property
    def _accumulates(self) -> bool:
        """Whether a step has several micro-batches whose gradients can be reached (not in DeepSpeed)."""
        alone = self.trainer.accumulate_grad_batches == 1
        return not (alone or self.trainer.strategy.handles_gradient_accumulation)

    def validation_step(self, batch: Batch, _: int) -> None:
        rows = Supervised.of(batch)
        whole = WholeBatch(len(rows), real_tokens(batch), self.device)
        step = self.step(rows, whole)
        figures = {"kl": self.distillation.measured(step), **self.objective.measured(step)}
        logged = {f"val/{key}": value for key, value in figures.items()}
        self.log_dict(logged, prog_bar=True, batch_size=whole.positions, sync_dist=True)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer([p for p in self.model.parameters() if p.requires_grad])
        return with_warmup(optimizer, self.trainer, self.warmup, self.final_lr, self.decay)

    # ------------------------------------------------------------------ records

    @property
    def teacher_weights(self) -> str | None:
        """Fingerprint of the teacher's weights: of a model of its own, else of the parent."""
        return self.teacher.weights or self.weights

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["recovery"] = {
            "tokens": self.tokens, "scope": self.scope, "rank": self.lora_rank, "keep": list(self.mask.keep),
            "unit": self.mask.unit,
            "patch": self.before, "frozen": self.frozen,
        }  # fmt: skip

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        check_units(checkpoint["recovery"], self.mask)
        if self._trainer is not None:
            check_averaged(checkpoint, self.trainer)
        self.tokens = checkpoint["recovery"]["tokens"]
