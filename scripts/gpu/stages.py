"""Search, cache and recovery of a random model of a real shape, a minute each: speed and peak memory.

Each runs as a user would run it, in a process of its own. What a pair of stage and variant cannot do is
recorded with its message: ``refused`` where the product says so before it loads anything, ``error`` where it
broke.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from scripts.gpu.cases import QUANTISED, SIZES, STAGES, TINY, command, fresh, result
from scripts.gpu.shapes import label
from scripts.lab.results import JSON

SHAPES = tuple(SIZES)
VARIANTS = ("single", "fsdp", "fsdp2", "deepspeed_z2", "deepspeed_z3", *QUANTISED)
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "NO_COLOR": "1", "COLUMNS": "130"}


def measure(args: argparse.Namespace, shape: str, variant: str, limit: float) -> JSON:
    """The stages, one after the other; what has no time left within ``limit`` seconds says so."""
    how, until = TINY if args.tiny else SIZES[shape], time.monotonic() + limit
    return {
        "model": label(shape, args.tiny), "batch_size": how.batch, "row_tokens": how.length,
        "scope": how.scope, "recovery_dtype": how.dtype, "recompute": how.recompute, "why": how.why,
        "rows": [{"stage": stage, **one(args, shape, variant, stage, until)} for stage in STAGES],
    }  # fmt: skip


def one(args: argparse.Namespace, shape: str, variant: str, stage: str, until: float) -> JSON:
    """Figures of one stage, or why there are none."""
    package = "deepspeed" if variant.startswith("deepspeed") else "bitsandbytes"
    if variant in (*QUANTISED, "deepspeed_z2", "deepspeed_z3") and not importlib.util.find_spec(package):
        return {"error": f"{package} is not installed"}
    name = f"{shape}-{variant}-{stage}"
    fresh(args.work, name)
    run, log = command(args, shape, variant, stage), Path(args.work, f"stage-{name}.log")
    began = time.monotonic()
    with log.open("w") as file:
        try:
            status = subprocess.run(
                [sys.executable, "-m", "src.cli", *run], stdout=file, stderr=subprocess.STDOUT,
                env={**os.environ, **QUIET}, timeout=max(1.0, until - began),
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"error": "no time was left"}
    if status:
        words = last_words(log.read_text(errors="replace"))
        return {"refused" if status == 2 else "error": words.removeprefix("error: ")}
    figures = json.loads(result(args.work, name).read_text())
    return {**figures, "wall_seconds": round(time.monotonic() - began, 1)}


def last_words(text: str, limit: int = 300) -> str:
    """What a failed process said at the end: its error, without the trace that led there."""
    text = re.sub(r"^\[rank\d+\]: ", "", text, flags=re.MULTILINE)
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or line.startswith("error:")]
    return (telling or lines or ["it said nothing"])[-1][:limit]
