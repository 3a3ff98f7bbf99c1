"""Recovery: distil the physically shortened model from the original.

The student is a plain, smaller Hugging Face model: nothing is gated any more. It learns from a teacher's
signal (live or cached) through an entropy-weighted divergence. The teacher lives in no module tree, so no
checkpoint, optimiser or sharding engine ever sees it.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedModel

from src.data.batches import real_tokens
from src.errors import ConfigError
from src.losses.distill import Distillation, supervised
from src.mask import Mask
from src.models.cut import cut
from src.models.head import OutputHead
from src.models.layers import decoder_layers, num_layers
from src.models.loading import Dtype, check_vocabulary, load_config, load_model
from src.schedules import Decay, with_warmup
from src.teachers import LiveTeacher, TeacherSource

Batch = dict[str, Tensor]
Scope = Literal["full", "cut_adjacent", "lora"]


class Recovery(LightningModule):
    """Trains the cut model to behave like its parent again.

    Args:
        mask: the ``mask.json`` of a search.
        model: Hub id or directory of the parent; None is the one the mask names.
        teacher: source of the teacher's signal; None runs the parent live.
        distillation: loss on that signal.
        scope: what trains: ``full``, the blocks next to each cut (``cut_adjacent``), or ``lora`` adapters on
            all linear layers (needs the extra ``lora``), merged on export.
        lora_rank: rank of the adapters.
        revision: Hub revision of the parent; None is the one the mask names.
        dtype: type of the weights; keep float32 and set ``trainer.precision`` for mixed precision.
        attention: attention implementation; None lets transformers choose.
        optimizer: optimiser of the weights that train.
        warmup: share of the run over which the learning rate rises.
        final_lr: share of the learning rate that is left at the end.
        decay: shape of its fall.
    """

    def __init__(
        self,
        mask: str,
        model: str | None = None,
        teacher: TeacherSource | None = None,
        distillation: Distillation | None = None,
        scope: Scope = "full",
        lora_rank: int = 16,
        revision: str | None = None,
        dtype: Dtype = "float32",
        attention: str | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup: float = 0.05,
        final_lr: float = 0.1,
        decay: Decay = "cosine",
    ) -> None:
        super().__init__()
        self.mask = Mask.load(mask)
        self.name, self.revision = model or self.mask.model, revision or self.mask.revision
        self.mask.check(num_layers(load_config(self.name, self.revision)), self.name)
        if self.name != self.mask.model:
            rank_zero_warn(f"model: '{self.name}' is recovered with a mask made for '{self.mask.model}'.")
        self.teacher = teacher or LiveTeacher()
        self.distillation = distillation or Distillation()
        self.scope, self.lora_rank = scope, lora_rank
        self.loading: dict[str, Any] = {"dtype": dtype, "attention": attention}
        self.optimizer = optimizer
        self.warmup, self.final_lr, self.decay = warmup, final_lr, decay
        self.tokens = 0

    # ------------------------------------------------------------------ model

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        parent = load_model(self.name, self.revision, **self.loading)
        self.model = scoped(cut(parent, self.mask.keep), self.mask, self.scope, self.lora_rank)
        self.teacher.adopt(parent)

    def on_fit_start(self) -> None:
        """Ready the output head and the teacher, now that the student is on its device."""
        self.head = OutputHead(self.model)
        self.head.check()
        check_vocabulary(cast(Any, self.trainer).datamodule.tokenizer, self.model)
        self.teacher.setup(self)

    def on_validation_start(self) -> None:
        """Ready too when validation is all that runs."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            self.on_fit_start()

    on_test_start = on_fit_start

    # ------------------------------------------------------------------ learning

    def losses(self, batch: Batch, distillation: Distillation) -> dict[str, Tensor]:
        """The weighted loss and its parts on one batch."""
        index = supervised(batch["labels"])
        labels_N = batch["labels"].flatten()[index + 1]
        signal = self.teacher.signal(batch, index)
        hidden_NH = self.head.hidden(batch).flatten(0, 1)[index]
        return distillation(self.head, hidden_NH, labels_N, signal)

    def training_step(self, batch: Batch, _: int) -> Tensor:
        parts = self.losses(batch, self.distillation)
        self.tokens += real_tokens(batch) * self.trainer.world_size
        self.log_dict({f"train/{key}": value for key, value in parts.items()}, prog_bar=True)
        return parts["loss"]

    def validation_step(self, batch: Batch, _: int) -> None:
        plain = Distillation(k=self.distillation.k, rule=self.distillation.rule, weight="none")
        parts = self.losses(batch, plain)
        size = int((batch["labels"][:, 1:] != -100).sum())
        self.log("val/kl", parts["kd"], prog_bar=True, batch_size=size, sync_dist=True)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer([p for p in self.model.parameters() if p.requires_grad])
        return with_warmup(optimizer, self.trainer, self.warmup, self.final_lr, self.decay)

    # ------------------------------------------------------------------ records

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["recovery"] = {
            "tokens": self.tokens, "scope": self.scope, "rank": self.lora_rank, "keep": list(self.mask.keep),
        }  # fmt: skip

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        same_layers(checkpoint["recovery"], self.mask)
        self.tokens = checkpoint["recovery"]["tokens"]


def same_layers(recovery: dict[str, Any], mask: Mask) -> None:
    """Refuse a checkpoint of other layers: cuts of one depth have the same shapes, so shapes cannot tell.

    Raises:
        ConfigError: names both sets of layers.
    """
    if tuple(recovery["keep"]) != mask.keep:
        raise ConfigError(
            f"checkpoint: it does not fit the mask: it was trained with layers {list(recovery['keep'])}, "
            f"the mask keeps {list(mask.keep)}. Give the mask it was trained with."
        )


def cut_adjacent(mask: Mask) -> set[int]:
    """Positions, in the cut model, of the blocks on both sides of each cut (CLP, arXiv 2510.23652)."""
    gaps = [i for i, (a, b) in enumerate(zip(mask.keep, mask.keep[1:], strict=False)) if b != a + 1]
    near = {i for gap in gaps for i in (gap, gap + 1)}
    if mask.keep[0] != 0:
        near.add(0)
    if mask.keep[-1] != mask.num_layers - 1:
        near.add(len(mask.keep) - 1)
    return near


def scoped(student: PreTrainedModel, mask: Mask, scope: Scope, rank: int) -> PreTrainedModel:
    """Mark what trains in the cut model.

    Raises:
        ConfigError: ``lora`` is asked and peft is not installed.
    """
    student.train().requires_grad_(scope == "full")
    if scope == "cut_adjacent":
        _, layers = decoder_layers(student)
        for i in cut_adjacent(mask):
            layers[i].requires_grad_(True)
    if scope == "lora":
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as e:
            raise ConfigError("model.scope: 'lora' needs peft: pip install -e '.[lora]'.") from e
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        return cast(PreTrainedModel, get_peft_model(student, config))
    return student


def load_student(parent: PreTrainedModel, mask: Mask, checkpoint: str) -> PreTrainedModel:
    """The recovered model as a plain one: the cut parent with a checkpoint's weights, adapters merged.

    Raises:
        ConfigError: the checkpoint is unreadable, not of a recovery, or of another mask.
    """
    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=False)
        same_layers(saved["recovery"], mask)
        scope, rank = saved["recovery"]["scope"], saved["recovery"]["rank"]
        state = {k.removeprefix("model."): v for k, v in saved["state_dict"].items()}
        student = scoped(cut(parent, mask.keep), mask, scope, rank)
        student.load_state_dict(state)
    except (OSError, KeyError, RuntimeError) as e:
        reason = str(e).splitlines()[0]
        raise ConfigError(f"checkpoint: '{checkpoint}' does not fit this model and mask: {reason}") from e
    plain = cast(Any, student).merge_and_unload() if scope == "lora" else student
    return cast(PreTrainedModel, plain.eval())
