"""Compute the memory of one rank under a strategy, from the trace of a step on one device without sharding.

Sharded parts are divided by the ranks. FSDP2 and ZeRO-3 gather the weights of the current layer and the next
for use, and those outside the layers (embeddings, final norm, head) throughout: these count whole in each
rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from src.errors import ConfigError
from src.models.loading import Quantization
from src.plan.devices import Device
from src.plan.trace import Trace
from src.plan.weights import Weights

Mode = Literal["shared", "copy", "int8", "nf4", "cached"]
OVERHEAD = "framework overhead"
OVERLAYS = Path(__file__).parents[2] / "configs" / "strategy"
_NAMES = {
    "auto": "single", "SingleDeviceStrategy": "single",
    "ddp": "ddp", "DDPStrategy": "ddp",
    "fsdp": "fsdp", "FSDP": "fsdp", "FSDPStrategy": "fsdp",
    "FSDP2": "fsdp2", "ModelParallelStrategy": "fsdp2",
    "deepspeed_stage_2": "deepspeed_z2", "deepspeed_stage_3": "deepspeed_z3",
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """Says how a stage is spread over devices.

    Attributes:
        stage: ``search``, ``recover`` or ``cache``.
        mode: form of the teacher. ``shared``: it is the student with open gates. ``copy``: the whole model.
            ``int8``, ``nf4``: a quantised one. ``cached``: its signal is read from disk.
        strategy: name of an overlay in ``configs/strategy/``, or ``single``.
        ranks: number of devices.
        beside: whether the teacher is a model of its own beside the student.
        quantize: quantisation of the only model that a search or a cache holds.
        half: whether DeepSpeed holds bfloat16 weights with float32 masters.
        offload: whether the optimiser's state lies in the host's memory.
    """

    stage: str
    mode: Mode
    strategy: str
    ranks: int
    beside: bool
    quantize: Quantization | None = None
    half: bool = False
    offload: bool = False


def overlay(strategy: str) -> tuple[str | None, bool]:
    """Return the precision of an overlay in ``configs/strategy/``, and whether it recomputes activations."""
    trainer = yaml.safe_load((OVERLAYS / f"{strategy}.yaml").read_text())["trainer"]
    callbacks = [c["class_path"].split(".")[-1] for c in trainer.get("callbacks+", [])]
    return trainer.get("precision"), "CheckpointActivations" in callbacks


def strategy_name(strategy: Any, ranks: int) -> str:
    """Return the name of the overlay that matches a trainer's ``strategy`` on so many ranks.

    Raises:
        ConfigError: it is none of them.
    """
    name = strategy if isinstance(strategy, str) else strategy.class_path.split(".")[-1]
    if name in ("ZeRO", "DeepSpeedStrategy"):
        return f"deepspeed_z{strategy.init_args.stage}"
    if name not in _NAMES:
        raise ConfigError(
            f"trainer.strategy: '{name}' cannot be planned; accepted: {', '.join(_NAMES)}, ZeRO."
        )
    return "ddp" if _NAMES[name] == "single" and ranks > 1 else _NAMES[name]


def memory(trace: Trace, at: Setting, device: Device) -> dict[str, int]:
    """Return the bytes of one rank by part, at the moment when it holds most.

    That is in the forward and backward passes, or in the optimiser's step if that needs more.

    Args:
        trace: what a step holds on one device without sharding.
        at: how the stage is spread over devices.
        device: kind of device, whose overhead and fragmentation are added as a part of their own.
    """
    moments = [_moment(trace.peak, trace, at, gathered=True)]
    if trace.step:
        moments.append(_moment(trace.step, trace, at, gathered=False))
    parts = max(moments, key=lambda moment: sum(moment.values()))
    return {**parts, OVERHEAD: device.overhead + int(device.fragmentation * sum(parts.values()))}


def _moment(peak: Mapping[str, int], trace: Trace, at: Setting, gathered: bool) -> dict[str, int]:
    """Return one rank's bytes at a peak of a whole device; ``gathered`` while sharded layers are in use."""
    part = {key: peak.get(key, 0) for key in ("teacher", "student", "gradients", "optimiser")}
    loose = {key: peak.get(key, 0) for key in ("activations", "loss chunk")}
    copy = at.mode if at.mode in ("int8", "nf4") else None
    part["teacher"] = trace.teacher.held(copy) if at.beside else 0
    if at.quantize is not None:
        part["student"] = trace.student.held(at.quantize)
    if gathered and (at.quantize is not None or (at.beside and copy)):
        loose["activations"] += trace.student.widest if at.quantize else trace.teacher.widest
    if at.strategy == "ddp":
        part["gradients"] *= 2  # its buckets are a second copy
    if at.strategy in ("fsdp", "fsdp2", "deepspeed_z3"):
        whole = part["gradients"]
        part["student"] = _sharded(part["student"], trace.student, at.ranks, gathered)
        part["gradients"] = min(whole, _sharded(whole, trace.student, at.ranks, gathered))
        part["optimiser"] //= at.ranks
    if at.strategy == "fsdp2" and at.beside and at.mode == "copy":
        part["teacher"] = _sharded(part["teacher"], trace.teacher, at.ranks, gathered)
    if at.strategy == "deepspeed_z2":
        part["gradients"] //= at.ranks
        part["optimiser"] //= at.ranks
    if at.strategy.startswith("deepspeed") and at.half:
        masters = 4 * trace.trainable // at.ranks
        part |= {"student": part["student"] // 2, "gradients": part["gradients"] // 2}
        part["optimiser"] += masters
    if at.offload:
        part["optimiser"] = 0
    return {**part, **loose}


def _sharded(whole: int, weights: Weights, ranks: int, gathered: bool) -> int:
    """Return a rank's bytes; while ``gathered``, two layers and the weights outside the layers are whole."""
    more = min(weights.whole, weights.root + 2 * weights.layer) if gathered and whole else 0
    return whole // ranks + more - more // ranks
