"""Memory of one rank under a strategy and a form of the teacher, from a trace of one whole device.

Sharded parts are divided by the ranks. What is gathered for the current layer and the next, and for the root
(embeddings, final norm, head) throughout, is whole: FSDP2 and ZeRO-3 hold it in each rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from src.errors import ConfigError
from src.models.loading import Quantization
from src.plan.devices import Device
from src.plan.trace import Trace
from src.plan.weights import Weights

Mode = Literal["shared", "copy", "int8", "nf4", "cached"]
OVERHEAD = "framework overhead"
_NAMES = {
    "auto": "single", "SingleDeviceStrategy": "single",
    "ddp": "ddp", "DDPStrategy": "ddp",
    "fsdp": "fsdp", "FSDP": "fsdp", "FSDPStrategy": "fsdp",
    "FSDP2": "fsdp2", "ModelParallelStrategy": "fsdp2",
    "deepspeed_stage_2": "deepspeed_z2", "deepspeed_stage_3": "deepspeed_z3",
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """How a stage is spread out.

    Attributes:
        stage: ``search``, ``recover`` or ``cache``.
        mode: form of the teacher: ``shared`` is the student with open gates; ``int8`` and ``nf4`` are the one
            model of a search or a cache in that form, or a copy beside the student of a recovery.
        strategy: name of an overlay in ``configs/strategy/``.
        ranks: devices.
        beside: whether the teacher is a model of its own.
        quantize: form of the one model of a search or a cache.
        half: whether DeepSpeed holds bfloat16 weights and float32 masters.
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


def strategy_name(strategy: Any, ranks: int) -> str:
    """Return the name of the strategy overlay that matches a trainer's ``strategy``.

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
    """Peak bytes of one rank by part: in the passes or, if more, in the optimiser's step."""
    moments = [_moment(trace.peak, trace, at, gathered=True)]
    if trace.step:
        moments.append(_moment(trace.step, trace, at, gathered=False))
    parts = max(moments, key=lambda moment: sum(moment.values()))
    return {**parts, OVERHEAD: device.overhead + int(device.fragmentation * sum(parts.values()))}


def _moment(peak: dict[str, int], trace: Trace, at: Setting, gathered: bool) -> dict[str, int]:
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
    """Return a rank's part; while ``gathered``, with two layers and the root whole."""
    more = min(weights.whole, weights.root + 2 * weights.layer) if gathered and whole else 0
    return whole // ranks + more - more // ranks
