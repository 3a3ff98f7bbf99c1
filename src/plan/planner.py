"""Estimate what a config costs as it stands, and with other teachers and strategies for the same stage."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pkgutil import resolve_name
from typing import cast

import torch
from jsonargparse import Namespace

from src.errors import ConfigError
from src.models.loading import Quantization, load_config, numbers
from src.plan.devices import Device, Tried
from src.plan.experiment import Experiment
from src.plan.memory import OVERHEAD, Mode, Setting, memory, overlay, strategy_name
from src.plan.trace import Trace, trace
from src.plan.work import CacheSize, cache_size, calibration
from src.policies.probe import PREFIX_GIB, stream_bytes
from src.search import MaskSearch

PLAIN: dict[str, Mode] = {"search": "shared", "recover": "copy", "cache": "copy"}


@dataclass(frozen=True)
class Estimate:
    """Holds what one way to run a stage costs.

    Attributes:
        setting: form of the teacher, and strategy.
        checkpoint: whether activations are recomputed.
        precision: precision of the trainer.
        parts: peak bytes of a rank, by part.
        fits: whether the device has that much memory.
        flops: floating-point operations of the whole run on all ranks.
        hours: duration of the run.
    """

    setting: Setting
    checkpoint: bool
    precision: str
    parts: dict[str, int]
    fits: bool
    flops: float
    hours: float

    @property
    def total(self) -> int:
        """Peak bytes of a rank."""
        return sum(self.parts.values())


class Planner:
    """Estimates the cost of ways to run an experiment.

    Args:
        experiment: the run that is planned.
        device: kind of device that it runs on.
        ranks: number of devices; None is the config's.
        tokens: tokens of the run; None is the config's.
    """

    def __init__(
        self, experiment: Experiment, device: Device, ranks: int | None = None, tokens: int | None = None
    ) -> None:
        if experiment.stage not in PLAIN:
            raise ConfigError(
                f"plan: model.class_path: '{experiment.stage}' cannot be planned; accepted: MaskSearch, "
                f"Recovery, CacheTeacher."
            )
        self.experiment, self.device, self.ranks = experiment, device, ranks or experiment.ranks
        self.asked = tokens
        self.tokens, self.steps = experiment.tokens(self.ranks, tokens)
        self.held = 0
        """Peak bytes of a trial; 0 without one."""
        self._traces: dict[tuple[bool, str | None], Trace] = {}

    def tried(self, trial: Tried) -> None:
        """Take speed and memory from steps of the config that were run on the device.

        A step is planned with as many tokens as one has on average; where a number of tokens ends the run, it
        takes so many steps more. Operations are those of full rows, so the efficiency makes up for shorter
        ones, also in what a search measures beside its steps. What the steps held beyond the tensors that are
        counted becomes overhead, in all ways to run; of a GPU they tell the tensors only, so it comes on top.
        Holes between tensors are still to come.

        Args:
            trial: what the steps took.
        """
        self.held = trial.memory
        self.tokens, self.steps = self.experiment.tokens(self.ranks, self.asked, trial.tokens)
        parts = self.configured.parts
        beyond = max(0, self.held - (sum(parts.values()) - parts[OVERHEAD]))
        peak = self.device.tflops[self._numbers(self.configured.precision)] * 1e12
        self.device = replace(
            self.device,
            efficiency=self._step(self.configured.setting, self.trace()) / trial.seconds / peak,
            overhead=beyond + (self.device.overhead if self.device.gpu else 0),
        )

    def within(self, hours: float) -> int:
        """Return how many steps of the config fit into so many hours, with what is validated and measured."""
        way, traced = self.configured, self.trace()
        every, batches = self.experiment.validation
        share = self.experiment.accumulate * batches / every
        flops = self._step(way.setting, traced) + share * _validation(way.setting, traced)
        each, kind = (flops, self.calibration * traced.teacher_flops), self._numbers(way.precision)
        step, beside = (self.device.seconds(flops, kind) for flops in each)
        return max(0, int((3600 * hours - beside) / step))

    # ------------------------------------------------------------------ ways to run

    @property
    def configured(self) -> Estimate:
        """Cost of the config as it stands."""
        model, stage = self.experiment.model, self.experiment.stage
        source = model.get("teacher")
        name = source.class_path.split(".")[-1] if source else None
        copy = ((source.get("init_args") or {}).get("quantize") if source else None) or "copy"
        quantize = cast(Quantization | None, model.get("quantize"))
        mode = {None: quantize or PLAIN[stage], "CachedTeacher": "cached"}.get(name, copy)
        setting = Setting(
            stage=stage,
            mode=cast(Mode, mode),
            strategy=strategy_name(self.experiment.trainer.strategy, self.ranks),
            ranks=self.ranks,
            beside=mode != "cached" and (stage == "recover" or name is not None),
            quantize=quantize,
        )
        return self.estimate(setting, self.recomputes, None)

    def way(
        self, mode: Mode, strategy: str, checkpoint: bool | None = None, offload: bool = False
    ) -> Estimate:
        """Return the cost of the stage with another form of the teacher, under another strategy.

        Args:
            mode: form of the teacher, such as int8 or cached.
            strategy: name of the overlay, which sets the precision on several GPUs.
            checkpoint: whether activations are recomputed; None follows the overlay and the config.
            offload: whether the optimiser's state lies in the memory of the host.
        """
        stage, (precision, recompute) = self.experiment.stage, overlay(strategy)
        one = stage != "recover" and mode in ("int8", "nf4")
        setting = Setting(
            stage=stage,
            mode=mode,
            strategy=strategy,
            ranks=self.ranks,
            beside=stage == "recover" and mode != "cached",
            quantize=cast(Quantization, mode) if one else None,
            offload=offload,
        )
        on_gpus = self.device.gpu and strategy != "single"
        return self.estimate(
            setting,
            recompute or self.recomputes if checkpoint is None else checkpoint,
            precision if on_gpus else None,
        )

    def estimate(self, setting: Setting, checkpoint: bool, precision: str | None) -> Estimate:
        """Return the cost of a setting, with activations recomputed if ``checkpoint``.

        ``precision`` is the trainer's; None is as configured.
        """
        traced = self.trace(checkpoint, precision)
        used = str(precision or self.experiment.trainer.precision or "32-true")
        setting = replace(setting, half="bf16" in used or used.startswith("16"))
        validated, looks = self.experiment.validated(self.steps), [traced.peak]
        if validated:  # logits, where training compares streams alone
            looks.append(traced.validation_peak)
        each = (memory(replace(traced, peak=peak), setting, self.device) for peak in looks)
        parts = max(each, key=lambda parts: sum(parts.values()))
        parts["activations"] = max(parts["activations"], self.remembered)  # they are held in turn
        flops = self._step(setting, traced) * self.steps + self.calibration * traced.teacher_flops
        flops += validated * _validation(setting, traced)
        return Estimate(
            setting=setting,
            checkpoint=checkpoint,
            precision=used,
            parts=parts,
            fits=sum(parts.values()) <= self.device.memory,
            flops=flops * self.ranks,
            hours=self.device.seconds(flops, self._numbers(used)) / 3600,
        )

    def _step(self, setting: Setting, traced: Trace) -> float:
        """Floating-point operations of a rank in a step of the optimiser."""
        return float(traced.flops - _unread(setting, traced)) * self.experiment.accumulate

    def trace(self, checkpoint: bool | None = None, precision: str | None = None) -> Trace:
        """Return the trace of a step, made at the first call.

        Args:
            checkpoint: whether activations are recomputed; None is as configured.
            precision: precision of the trainer; None is as configured.
        """
        key = (self.recomputes if checkpoint is None else checkpoint, precision)
        if key not in self._traces:
            module = self.experiment.module(*key)
            self._traces[key] = trace(module, self.experiment.rows.batch(), self.device.gpu)
        return self._traces[key]

    # ------------------------------------------------------------------ what they have in common

    @property
    def recomputes(self) -> bool:
        """Whether the config recomputes activations."""
        asked = bool(self.experiment.model.get("checkpoint_activations"))
        return asked or "CheckpointActivations" in self.experiment.callbacks

    @cached_property
    def calibration(self) -> float:
        """Number of forward passes of a batch that a search makes beside its steps; 0 if it is not counted.

        It is not counted for a policy that measures too much, such as all masks.
        """
        if self.experiment.stage != "search":
            return 0.0
        module = self.experiment.module()
        assert isinstance(module, MaskSearch)
        return calibration(module, self.streams) or 0.0

    @cached_property
    def streams(self) -> int:
        """Largest number of units' outputs, each for one batch, that a search holds to measure masks.

        It is 0 for other stages, and for units of width.
        """
        module = self.experiment.module()
        if not isinstance(module, MaskSearch) or module.policy.kind.wide:
            return 0
        harden = self.experiment.callbacks.get("HardenMask", {"prefix_gib": 0}) or {}
        held = int(harden.get("prefix_gib", PREFIX_GIB) * 2**30 // self._stream)
        return min(held, (module.calibration_batches + 1) * (module.policy.units - 1))

    @property
    def remembered(self) -> int:
        """Bytes of the outputs that :attr:`streams` counts."""
        return self.streams * self._stream if self.streams else 0

    @property
    def _stream(self) -> int:
        """Bytes of one layer's output for a batch."""
        model, rows = self.experiment.model, self.experiment.rows
        dtype = getattr(torch, self._numbers(str(self.experiment.trainer.precision or "32-true")))
        config = load_config(self.experiment.name, model.get("revision"))
        return stream_bytes(config, dtype, rows.count * rows.length)

    @property
    def terms(self) -> list[Namespace]:
        """The terms of the loss, each with its ``class_path`` and ``init_args``."""
        model = self.experiment.model
        terms = (model.get("distillation"), *(each.term for each in model.get("terms") or ()))
        return [term for term in terms if term]

    @property
    def needs_live(self) -> bool:
        """Whether some term reads what no cache holds: inner layers, or all of a distribution."""
        given = [term.get("init_args") or {} for term in self.terms]
        compares = any(resolve_name(term.class_path).compares() for term in self.terms)
        return compares or any(each.get("tail") or each.get("k", 10) is None for each in given)

    @property
    def cache(self) -> CacheSize:
        """Size of a cache of the run's tokens."""
        model, rows = self.experiment.model, self.experiment.rows
        asked = [model.get("k"), *((term.get("init_args") or {}).get("k") for term in self.terms)]
        k = next(filter(None, asked), 10)
        positions = self.tokens * rows.positions // (rows.count * rows.length)
        return cache_size(self.tokens, positions, k, model.get("precision") or "float16")

    @property
    def checkpoints(self) -> int:
        """Bytes of the checkpoints that are there at the end: weights that train, optimiser's state."""
        callbacks = self.experiment.callbacks
        kept = callbacks.get("LastCheckpoint") or callbacks.get("ModelCheckpoint") or {}
        best = int(kept.get("save_top_k", 1))
        if best < 0:  # all
            best = self.steps // int(kept.get("every_n_train_steps") or 1)
        files = best + bool(kept.get("save_last"))
        return files * (4 * self.trace().trainable + self.trace().peak.get("optimiser", 0))

    def _numbers(self, precision: str) -> str:
        """Return the type of the numbers that are multiplied under a precision of the trainer."""
        if precision.startswith(("bf16", "16")):
            return "bfloat16" if precision.startswith("bf16") else "float16"
        model = self.experiment.model
        return numbers(self.experiment.name, model.get("dtype") or "float32", model.get("revision"))


def _unread(setting: Setting, traced: Trace) -> int:
    """Return the operations of a batch that a cache saves: those of the teacher."""
    return traced.teacher_flops if setting.mode == "cached" else 0


def _validation(setting: Setting, traced: Trace) -> int:
    """Return the operations of a rank in the validation of a batch."""
    return traced.validation_flops - _unread(setting, traced)
