"""How the time of a search step grows with layers, width and tokens; CPU seconds of one thread."""

from __future__ import annotations

import statistics
from argparse import Namespace
from pathlib import Path

from scripts.lab.benches import in_turns
from scripts.lab.results import JSON
from scripts.search_step import OURS, ladder

BASE = {"layers": 12, "hidden": 256, "rows": 2, "tokens": 128}
SWEEPS: dict[str, tuple[int, ...]] = {
    "layers": (6, 12, 24, 48), "hidden": (64, 128, 256, 512), "rows": (1, 2, 4, 8),
    "tokens": (64, 128, 256, 512),
}  # fmt: skip
REPEATS = 5


def measure(_: Path) -> JSON:
    """Median seconds of a step along each axis, the others as in the base, and what operations predict."""
    sweeps = {axis: [point(axis, value) for value in values] for axis, values in SWEEPS.items()}
    for points in sweeps.values():
        base = next(p for p in points if p["base"])
        for p in points:
            p["times_base"] = p["seconds"] / base["seconds"]
            p["operations_times_base"] = p["operations"] / base["operations"]
    return {"base": BASE, "repeats": REPEATS, "sweeps": sweeps}


def point(axis: str, value: int) -> JSON:
    """One size: seconds of the product's step, and its operations in layers and head."""
    size = {**BASE, axis: value}
    fixed = {"vocabulary": 1024, "draws": 4, "remove": size["layers"] // 4, "prompt": 0.0}
    step = ladder(Namespace(**size, **fixed, device="cpu", dtype="float32"))[OURS]
    seconds = in_turns({OURS: step}, REPEATS)[OURS]
    return {
        axis: value, "base": value == BASE[axis], "seconds": statistics.median(seconds),
        "operations": operations(size["layers"], size["hidden"], size["rows"], size["tokens"], 1024, 4),
    }  # fmt: skip


def operations(layers: int, hidden: int, rows: int, tokens: int, vocabulary: int, draws: int) -> float:
    """Multiply-adds of a search step.

    One open pass, and for each draw a pass and a backward through the activations of the kept three quarters.
    A layer of ``lab.benches.qwen`` has 4 heads of ``hidden / 4`` with 2 of keys and values (3 hidden^2
    weights) and a feed-forward part of 3 hidden (9 hidden^2).
    """
    layer = 12 * hidden**2 + 2 * tokens * hidden
    head = vocabulary * hidden
    return rows * tokens * (layers * layer * (1 + draws * 1.75) + head * (1 + 2 * draws))
