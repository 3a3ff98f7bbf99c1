"""Recommend the simplest way to run a stage that fits the device, and say why no simpler one does.

A *way* is a form of the teacher, a strategy, and whether activations are recomputed or the optimiser is
offloaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from src.plan.memory import Mode
from src.plan.planner import Estimate, Planner

GIB = 1 << 30
RECOMPUTE = "--trainer.callbacks+=src.callbacks.CheckpointActivations"


@dataclass(frozen=True)
class Advice:
    """Holds the recommended way to run a stage.

    Attributes:
        best: cost of the first way that fits; None if none does.
        options: options to add to the command.
        reason: why this way, in one or two sentences; if none fits, what to change.
    """

    best: Estimate | None
    options: tuple[str, ...]
    reason: str


Way = tuple[Mode, str, bool | None, bool]
"""Form of the teacher; strategy overlay; whether activations are recomputed (None: as the overlay says);
whether the optimiser's state lies in the host's memory."""


def ways(stage: str, ranks: int, cached: bool = True) -> list[Way]:
    """Return the ways to run a stage, the most exact and the simplest first.

    Args:
        stage: ``search``, ``recover`` or ``cache``.
        ranks: number of devices.
        cached: whether a cache will do: the disk has room for it, and it holds all that the loss reads.
            Otherwise the teacher must run live.
    """
    one, many = "ddp" if ranks > 1 else "single", ranks > 1
    if stage == "search":
        shards: list[Way] = [("shared", "fsdp2", None, False)] if many else []
        packed: list[Way] = [(m, one, c, False) for m in ("int8", "nf4") for c in (False, True)]
        return [("shared", one, False, False), ("shared", one, True, False), *shards, *packed]
    if stage == "cache":
        shards = [("copy", "fsdp2", None, False)] if many else []
        return [("copy", one, None, False), *shards, ("int8", one, None, False), ("nf4", one, None, False)]
    without: list[Mode] = ["cached"] if cached else ["int8", "nf4"]
    plain: list[Way] = [("copy", one, c, False) for c in (False, True)]
    plain += [(m, one, c, False) for m in without for c in (False, True)]
    shards = [(m, "fsdp2", None, False) for m in ("copy", *without)] if many else []
    return [*plain, *shards, *((m, "deepspeed_z3", None, True) for m in without)]


_WHY = {
    ("search", "shared"): "one copy of the weights is teacher (gates open) and student",
    ("search", "int8"): "one 8-bit copy is teacher and student; gradients reach the gates through it",
    ("search", "nf4"): "one 4-bit copy is teacher and student; gradients reach the gates through it",
    ("recover", "copy"): "the parent runs beside the student in full precision: nothing to prepare",
    (
        "recover",
        "cached",
    ): "the parent is run once beforehand and takes no memory and no time of the recovery",
    ("recover", "int8"): "no cache will do, and the parent fits beside the student in 8 bits",
    ("recover", "nf4"): "no cache will do, and the parent fits beside the student in 4 bits",
    ("cache", "copy"): "the teacher fits as it is, so its signal is exact",
    ("cache", "int8"): "the teacher fits in 8 bits only; its signal is nearly the same",
    ("cache", "nf4"): "the teacher fits in 4 bits only; its signal is an approximation",
}


def advise(planner: Planner, disk: float | None = None) -> Advice:
    """Try the ways to run a stage in order, and recommend the first that fits the device.

    Args:
        planner: planner of the stage.
        disk: bytes that a cache may take; None is no limit.
    """
    stage = planner.experiment.stage
    cached = not planner.needs_live and (disk is None or planner.cache.expected <= disk)
    refused: list[Estimate] = []
    for mode, strategy, checkpoint, offload in ways(stage, planner.ranks, cached):
        if planner.experiment.whole and strategy not in ("single", "ddp"):
            continue
        estimate = planner.way(mode, strategy, checkpoint, offload)
        if estimate.fits:
            return Advice(estimate, tuple(_options(estimate, planner)), _reason(estimate, refused, planner))
        refused.append(estimate)
    least = min(refused, key=lambda e: e.total)
    largest = max(least.parts, key=lambda part: least.parts[part])
    knobs = [
        "more devices",
        "a device with more memory",
        "a shorter data.max_length",
        "a smaller data.batch_size",
    ]
    if planner.experiment.model.get("dtype") == "float32" and stage != "recover":
        knobs.insert(0, "--model.init_args.dtype bfloat16, which halves the weights")
    reason = (
        f"Nothing fits {_gib(planner.device.memory)}: the least is {label(least)} with {_gib(least.total)}, "
        f"most of it {largest}. Try {', '.join(knobs)}."
    )
    return Advice(None, (), reason)


def label(e: Estimate) -> str:
    """Return in words the way whose cost was estimated, such as ``int8 teacher, ddp``."""
    extra = ", activations recomputed" if e.checkpoint else ""
    extra += ", optimiser in host memory" if e.setting.offload else ""
    return f"{e.setting.mode} teacher, {e.setting.strategy}{extra}"


def _options(e: Estimate, planner: Planner) -> Iterator[str]:
    """Yield the options that a way adds to the command line; its overlays bring the rest."""
    s = e.setting
    if s.strategy != "single":
        yield f"--config configs/strategy/{s.strategy}.yaml"
    if e.checkpoint and not planner.recomputes and s.strategy in ("single", "ddp"):
        yield RECOMPUTE
    if s.offload:
        yield "--trainer.strategy.init_args.offload_optimizer true"
    if s.mode in ("int8", "nf4"):
        yield f"--model.init_args.{'teacher.init_args.' if s.beside else ''}quantize {s.mode}"
    if s.mode == "cached":
        yield "--config configs/cache/recover.yaml"


def _reason(estimate: Estimate, refused: list[Estimate], planner: Planner) -> str:
    why = _WHY[planner.experiment.stage, estimate.setting.mode]
    reason = f"{why[0].upper()}{why[1:]}; {_gib(estimate.total)} of {_gib(planner.device.memory)}."
    if refused:
        short = min(refused, key=lambda e: e.total)
        reason += (
            f" Simpler ways do not fit; the smallest of them, {label(short)}, takes {_gib(short.total)}."
        )
    return reason


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f} GiB"
