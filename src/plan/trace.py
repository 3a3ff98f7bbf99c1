"""Run one step of a search, a recovery or a cache without data, and note what it holds and computes.

The step is the stage's own: its gated model, its loss and its teacher's signal, on a batch of full rows.
Models are built on the meta device. Then each tensor becomes a fake one, without data, whose device is
a CPU, so that the operations are those of a real run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from src.cache.teacher import CacheTeacher
from src.data.batches import Batch
from src.errors import ConfigError, first_line
from src.models.head import OutputHead
from src.models.loading import weightless
from src.plan.ledger import Ledger, fused_attention
from src.plan.steps import STEPS, PlannedTeacher
from src.plan.weights import Weights, tensors
from src.recover import Recovery
from src.search import MaskSearch
from src.training.progress import waiting
from src.training.stage import Stage


@dataclass(frozen=True)
class Trace:
    """Holds what one micro-batch of a stage costs on one device, with nothing quantised or sharded.

    Attributes:
        peak: bytes by part (:data:`src.plan.ledger.PARTS`) when their sum is highest, before the optimiser's
            step.
        flops: floating-point operations of the step.
        teacher_flops: operations of the teacher's forward pass among these.
        parent: number of weights of the parent.
        trainable: number of weights that are trained.
        student: sizes of the model that is searched, recovered or run.
        teacher: sizes of the teacher's own model; if it has none, those of the parent.
        step: bytes by part when their sum is highest in the optimiser's step; empty if the stage has none.
        validation_flops: operations of a recovery's validation of the same batch, the teacher's included.
        validation_peak: as ``peak``, of that validation.
    """

    peak: Mapping[str, int]
    flops: int
    teacher_flops: int
    parent: int
    trainable: int
    student: Weights
    teacher: Weights
    step: dict[str, int] = field(default_factory=dict)
    validation_flops: int = 0
    validation_peak: Mapping[str, int] = field(default_factory=dict)


@waiting("a step is run without data")
def trace(module: LightningModule, batch: Batch, gpu: bool) -> Trace:
    """Build the models of a stage without weights, run its step once, and return what it costs.

    Args:
        module: a search, a recovery or a cache, as its config makes it, attached to a trainer. It cannot be
            used again.
        batch: rows as the data module makes them.
        gpu: whether to count attention as the kernels of GPUs compute it.

    Raises:
        ConfigError: the stage cannot be planned, or the model's code needs the values of its tensors.
    """
    step = next((STEPS[c] for c in type(module).__mro__ if c in STEPS), None)
    if step is None or not isinstance(module, Stage):
        raise ConfigError(
            f"plan: model.class_path: {type(module).__name__} cannot be planned; accepted: "
            f"{', '.join(c.__name__ for c in STEPS)}."
        )
    teacher, parent = _build(module)
    student = module.head.model
    beside = teacher.head.model if teacher and teacher.head else None
    weights, count = Weights.of(beside or parent), sum(p.numel() for p in parent.parameters())
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    opened = module.opened if isinstance(module, Recovery) else None
    own = [student, *([opened.model] if opened else [])]
    _arm([*own, *([beside] if beside else [])], fake)
    ledger = _ledger(module.head.vocabulary, own, beside)
    if teacher is not None:
        teacher.ledger = ledger
    heads = [x for x in (module.head, opened and opened.head, teacher and teacher.head) if x]
    try:
        with ExitStack() as stack:
            for head in heads:
                without = partial(_without_data, fake)
                hook = head.decoder.register_forward_pre_hook(without, with_kwargs=True)
                stack.callback(hook.remove)
            stack.enter_context(ledger)
            if gpu:
                stack.enter_context(fused_attention(ledger))
            counted = step(module, batch, ledger, gpu)
    except Exception as e:
        raise ConfigError(
            f"plan: a step of a '{student.config.model_type}' cannot be run without data: "
            f"{type(e).__name__}: {first_line(e)[:200]}"
        ) from e
    return Trace(
        peak=dict(ledger.peak),
        flops=ledger.flops,
        teacher_flops=counted.teacher,
        parent=count,
        trainable=sum(p.numel() for p in student.parameters() if p.requires_grad),
        student=Weights.of(student),
        teacher=weights,
        step=dict(ledger.step_peak),
        validation_flops=counted.validation,
        validation_peak=counted.validation_peak,
    )


def _ledger(vocabulary: int, own: Sequence[nn.Module], beside: nn.Module | None) -> Ledger:
    """Return a ledger that knows the weights of the stage's own models, and of a teacher beside them."""
    ledger = Ledger(vocabulary)
    for model in own:
        ledger.own(tensors(model), "student")
    if beside is not None:
        ledger.own(tensors(beside), "teacher")
    return ledger


def _build(stage: Stage) -> tuple[PlannedTeacher | None, PreTrainedModel]:
    """Build the models on the meta device; return what stands in for the teacher, and the parent."""
    teacher = None
    if isinstance(stage, MaskSearch | Recovery) and stage.teacher is not None:
        teacher = stage.teacher = PlannedTeacher(stage.teacher, (stage.name, stage.revision))
        teacher.k = stage.distillation.asks
    if isinstance(stage, MaskSearch) and stage.unit == "half":
        # Halves are found by running a model; a step of halves costs what one of whole layers does.
        stage.unit = "layer"
        stage.policy.setup(stage.num_layers, stage.policy.target, stage.policy.pinned)
    token = weightless.set(True)
    try:
        with torch.device("meta"):
            parent = replace(stage.loading, quantize=None).load(stage.name)
            if isinstance(stage, CacheTeacher):  # it would take the fingerprint of its weights
                stage.model = parent.requires_grad_(False)
                stage.head = OutputHead(parent)
            stage.configure_model()
            if isinstance(stage, MaskSearch) and teacher:
                teacher.adopt(parent)  # a copy beside the gated model
            stage.trainer.precision_plugin.convert_module(stage)
    finally:
        weightless.reset(token)
    return teacher, parent


def _without_data(
    fake: FakeTensorMode, _: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Return the inputs of a decoder as tensors without data: a hook before its forward pass."""
    # A single row is never padded, so that it needs no mask.
    drop = "attention_mask" if kwargs["input_ids"].shape[0] == 1 else ""
    inputs = {k: fake.from_tensor(v) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    return args, {k: v for k, v in inputs.items() if k != drop}


def _arm(models: Sequence[nn.Module], fake: FakeTensorMode) -> None:
    """Replace models' tensors on the meta device by fake ones of ``fake``; a shared one stays shared."""
    known: dict[int, Any] = {}
    for module in (module for model in models for module in model.modules()):
        for held in (module._parameters, module._buffers):
            tensors: dict[str, Any] = held
            for name, old in tensors.items():
                if old is None or old.device.type != "meta":
                    continue
                if id(old) not in known:
                    with fake:
                        new = torch.empty(old.shape, dtype=old.dtype)
                    trained = isinstance(old, nn.Parameter)
                    known[id(old)] = nn.Parameter(new, old.requires_grad) if trained else new
                tensors[name] = known[id(old)]
