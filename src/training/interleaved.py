"""Prune and recover in turns: remove a little, train a little, score again (Adapt-Pruner, arXiv 2502.03460).

The student begins as its parent. With each stage the units that matter least go from the student as it is by
then, and it trains until the next. One schedule of the learning rate spans all stages, and the optimiser
keeps what it has gathered for what survives. The run ends with ``mask.json`` and the cut by this mask.

*The paper's*: the turns and the one schedule; the centred importances that divide a removal of width among
the layers; within a layer the first-order Taylor score of coupled weights. *Ours*: layers and halves of
layers; a distillation as what trains; the batch at hand as calibration rows; and the end: all layers are as
wide. So importances say which become narrow early; these hold their place by closed units, behind gates.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from src.callbacks import Sparsify
from src.data.batches import Batch, Supervised, real, real_tokens
from src.errors import ConfigError
from src.mask import Mask, Unit
from src.models.cut import cut
from src.models.head import OutputHead
from src.policies.probe import LABELS
from src.ranges import Count, NonNegative, Range, checked, inside_unit
from src.recover import Recovery
from src.training.carry import carry
from src.training.ranks import WholeBatch
from src.training.schedules import share_done, total_steps
from src.training.scopes import recompute, scoped
from src.training.strategies import SHARDED, kind
from src.units.goal import Goal
from src.units.importance import block_influence, taylor
from src.units.kinds import KINDS
from src.units.spaces import Kept


class Interleaved(Recovery):
    """Removes units in the course of a recovery, and writes the mask that it ends with.

    One of ``mask``, ``remove`` and ``ratio`` says how much goes; the other two are null.

    Args:
        model: Hub id or directory of the parent.
        mask: a ``mask.json`` of the parent, of which the kind of unit and the number that goes are taken.
            Which of them go is found anew.
        unit: kind of what is removed, if no mask says so; see :class:`src.search.MaskSearch`.
        remove: number of layers; of attentions and as many feed-forwards, if halves are removed; of KV groups
            or channels in each layer, if these are.
        ratio: the same number as a share, in (0, 1).
        stages: number of removals, T. The t-th comes at the share ``until (t - 1) / T`` of the run.
        until: share of the run that the stages divide among them.
        amplitude: of width, how far the most important layer lags behind the mean at each stage; 0: not.
        kwargs: of a recovery; see :class:`src.recover.Recovery`.
    """

    @checked
    def __init__(
        self,
        model: str,
        mask: str | None = None,
        unit: Unit = "layer",
        remove: int | None = None,
        ratio: Annotated[float, inside_unit] | None = None,
        stages: Count = 5,
        until: Annotated[float, Range(float, 0, 1, open="low")] = 1.0,
        amplitude: NonNegative = 0.02,
        **kwargs: Any,
    ) -> None:
        self.goal = Goal.of(model, kwargs.get("revision"), mask, unit, remove, ratio)
        super().__init__(mask or "", model, **kwargs)
        self.stages, self.until, self.amplitude = stages, until, amplitude
        self.kept: Kept = self.mask.keep
        """The parent's units that are left."""
        self.history: list[dict[str, int]] = []
        """Of each stage so far, the step before which it came and the number of units that it left."""
        self._gated = ExitStack()

    def begin(self, mask: str) -> Mask:
        return self.goal.whole

    def refuse(self, trainer: Trainer, data: object) -> None:
        strategy, steps, precision = kind(trainer.strategy), trainer.max_steps, str(trainer.precision)
        sparse = any(isinstance(c, Sparsify) for c in getattr(trainer, "callbacks"))  # noqa: B009 (mypy)
        reasons = {
            f"model.scope: '{self.scope}' trains a part of the weights; set it to full": self.scope != "full",
            "model.patch: it repairs a cut, and there is none yet": bool(self.patch or self.adapters),
            "model.closing: units go stage by stage; set it to 0": self.closing > 0,
            f"trainer.strategy: '{strategy}' shards the student; use ddp": strategy in SHARDED,
            f"trainer.precision: '{precision}' rounds the weights": precision.endswith("16-true"),
            f"trainer.max_steps: {steps} given, and {self.stages} stages need one each": steps < self.stages,
            "data.max_tokens: it may end the run too early": getattr(data, "max_tokens", None) is not None,
            "trainer.callbacks: Sparsify masks what is to go": sparse,
        }
        if found := [reason for reason, holds in reasons.items() if holds]:
            raise ConfigError(f"{type(self).__name__}: {found[0]}. Change that, or use src.recover.Recovery.")
        super().refuse(trainer, data)
        for mask in self.goal.less_one_layer():  # a term may name a layer that will go
            self.objective.pairs(mask)

    # ------------------------------------------------------------------ stages

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Remove what goes before this step."""
        super().on_train_batch_start(batch, batch_idx)
        done = share_done(self.trainer, self.trainer.global_step, total_steps(self.trainer))
        stage = min(self.stages, math.floor(done / self.until * self.stages + 1e-9) + 1)
        if stage <= len(self.history):
            return
        kept = self.chosen(batch, stage / self.stages)
        self.shrink(kept, self.goal.shape(kept, self.mask.keep), self.trainer.optimizers[0])
        self.close()
        self.history += [{"step": self.trainer.global_step, "units": len(kept)}] * (stage - len(self.history))
        rank_zero_info(f"stage {stage} of {self.stages}: {len(kept)} of {self.mask.units} units are left")
        if isinstance(strategy := self.trainer.strategy, DDPStrategy):
            strategy.model = self  # wrapped anew, as the wrapper knows each weight
            strategy.configure_ddp()

    def chosen(self, batch: Batch, share: float) -> Kept:
        """Return the units that stay when a share of all that is to go has gone, scored on a batch."""
        self.model.eval()
        try:
            with self.trainer.precision_plugin.forward_context():
                unit, run = self.mask.unit, lambda: self.head.hidden(batch)
                influence_U = block_influence(self.model, unit, real(batch), run)
                if (width := self.goal.width) is None:
                    return self.goal.best(self.kept, influence_U, share)
                rows = Supervised.of(batch)
                step = self.step(rows, WholeBatch(len(rows), real_tokens(batch), self.device))
                own = replace(width, count=len(self.mask.keep) // self.mask.num_layers)
                scores_LW = taylor(self.model, own, LABELS.loss(step)["loss"])
        finally:
            self.model.train()
        scores_U = torch.zeros(self.mask.units, dtype=scores_LW.dtype)
        scores_U[list(self.mask.keep)] = scores_LW.flatten()
        return self.goal.narrower(self.kept, scores_U, influence_U, share, self.amplitude)

    def shrink(self, kept: Kept, mask: Mask, optimizer: Optimizer | None = None) -> None:
        """Cut the student to a mask that holds the units ``kept``; an optimiser then trains what is left."""
        self._gated.close()
        stays = set(mask.keep)
        own = tuple(at for at, unit in enumerate(self.mask.keep) if unit in stays)
        if len(own) < len(self.mask.keep):
            width = self.mask.width and len(self.mask.keep) // self.mask.num_layers
            inside = replace(self.mask, num_layers=self.mask.depth, keep=own, width=width)
            old, self.model = self.model, scoped(cut(self.model, inside), inside, "full", self.lora_rank)
            if self.checkpoint_activations:
                recompute(self.model)
            if optimizer is not None:
                carry(optimizer, old, self.model, inside)
            self.head = OutputHead(self.model)
            self.__dict__.pop("writers", None)  # they were those of the larger student
        self.mask, self.kept = mask, kept

    def close(self) -> None:
        """Put gates at 0 on units of the student that are not kept."""
        kept = set(self.kept)
        if len(kept) < len(self.mask.keep):
            gates = KINDS[self.mask.unit].gate(self.model)
            self._gated.callback(gates.remove)
            open_U = torch.tensor([float(unit in kept) for unit in self.mask.keep], device=self.device)
            self._gated.enter_context(gates.use(open_U))  # until the next cut, also where layers run again

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.close()

    def on_train_end(self) -> None:
        """Write the mask, if the run has come to its last stage."""
        path = Path(self.trainer.log_dir or ".") / "mask.json"  # log_dir asks all ranks
        self.figures["stages"] = self.history
        if self.trainer.interrupted or not self.trainer.is_global_zero:
            return
        if (came := len(self.history)) < self.stages:
            rank_zero_warn(f"no mask: stage {came} of {self.stages} was the last. Resume the run.")
        else:
            method = type(self).__name__
            replace(self.mask, method=method, fingerprint=self.weights, tokens_seen=self.tokens).save(path)
            rank_zero_info(f"{self.mask}; written to {path}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["stages"] = {"kept": list(self.kept), "history": self.history}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Cut the student to what it was, before its weights are loaded."""
        noted, there = checkpoint.get("stages"), checkpoint["recovery"]
        if noted and there["unit"] == self.mask.unit and {*there["keep"]} <= {*self.mask.keep}:
            self.shrink(tuple(noted["kept"]), replace(self.mask, keep=tuple(there["keep"])))
            self.history = noted["history"]
        super().on_load_checkpoint(checkpoint)
