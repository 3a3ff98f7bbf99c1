"""Read what devices can do (peak speed and memory, with their sources) from ``configs/devices.json``."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from src.errors import ConfigError, did_you_mean
from src.training import control_groups

FILE = Path(__file__).parents[2] / "configs" / "devices.json"
GIB = 1 << 30


@dataclass(frozen=True)
class Device:
    """Describes a kind of device.

    Attributes:
        name: its key in the file.
        title: its full name.
        memory: bytes that a process can use.
        tflops: peak speed of dense matrix products by type of their factors, in 1e12 operations per second.
        efficiency: share of the peak that a training step reaches; an assumption.
        overhead: bytes taken before the first tensor (context, libraries' workspaces); an assumption.
        fragmentation: share of the tensors' bytes that the allocator holds beyond them; an assumption.
        source: where memory and speed come from.
    """

    name: str
    title: str
    memory: int
    tflops: dict[str, float]
    efficiency: float
    overhead: int
    fragmentation: float
    source: str

    @property
    def gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.name != "cpu"

    def seconds(self, flops: float, dtype: str) -> float:
        """Return the seconds that so many floating-point operations take on numbers of type ``dtype``."""
        return flops / (self.tflops[dtype] * 1e12 * self.efficiency)


@dataclass(frozen=True)
class Tried:
    """What a trial took (:mod:`src.plan.trial`).

    Attributes:
        seconds: of a step, or a batch of a cache, as long as they are on average.
        memory: peak bytes of the process, or on a GPU of its tensors.
        tokens: of such a step, without padding; None is those of full rows.
    """

    seconds: float
    memory: int
    tokens: float | None = None


def device(name: str) -> Device:
    """Return the device of this name; ``cpu`` is this machine, whose speed is measured.

    Raises:
        ConfigError: the file has no such device.
    """
    table = _table()
    known = table["devices"]
    if name not in known:
        raise ConfigError(
            f"--device: '{name}' is unknown; accepted: {', '.join(known)}."
            f"{did_you_mean(name, known)} Add others to {FILE.relative_to(FILE.parents[1])}."
        )
    entry = {**table["assumed"], **known[name]}
    kinds = ("float32", "bfloat16", "float16")
    tflops = entry.get("tflops") or {kind: _matmul_tflops(getattr(torch, kind)) for kind in kinds}
    return Device(
        name=name,
        title=entry["title"],
        memory=int(entry["memory_gib"] * GIB) if "memory_gib" in entry else _machine_memory(),
        tflops=tflops,
        efficiency=entry["efficiency"],
        overhead=int(entry["overhead_gib"] * GIB),
        fragmentation=entry["fragmentation"],
        source=entry["source"],
    )


def this_machine() -> str | None:
    """Name the entry of the GPU that this process would use, ``cpu`` without one, or None if it is unknown.

    Among entries of one chip, such as ``a100`` and ``a100-40``, it is that of the nearest memory.
    """
    if not torch.cuda.is_available():
        return "cpu"
    title, memory = torch.cuda.get_device_name().lower(), torch.cuda.mem_get_info()[1] / GIB
    known = _table()["devices"]
    fitting = [name for name in known if name.split("-")[0] in title]
    return min(fitting, key=lambda name: abs(known[name]["memory_gib"] - memory), default=None)


def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(FILE.read_text())
    return table


def _machine_memory() -> int:
    """Return the bytes of this machine's memory, or of the part that a container gives to its processes."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *control_groups.memory()])


@cache
def _matmul_tflops(kind: torch.dtype, size: int = 768, seconds: float = 0.2) -> float:
    """Return the speed of matrix products of a type on this machine's CPU, on all of torch's threads."""
    a, runs = torch.ones(size, size, dtype=kind), 0
    torch.mm(a, a)
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        torch.mm(a, a)
        runs += 1
    return 2 * size**3 * runs / (time.perf_counter() - began) / 1e12
