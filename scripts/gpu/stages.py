"""Search, cache and recovery of a random model of a real shape, a minute each: speed and peak memory.

Each runs as a user would run it, in a process of its own. What a pair of stage and variant cannot do is
recorded with its message: ``refused`` where the product says so before it loads anything, ``error`` where it
broke.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

from scripts.gpu.cases import STAGES, command, fresh, result, size
from scripts.gpu.catalogue import LIMIT, missing
from scripts.gpu.part import environment, last_words, options, record
from scripts.gpu.shapes import label

EXTRA = {
    "deepspeed_z2": "deepspeed",
    "deepspeed_z3": "deepspeed",
    "int8": "bitsandbytes",
    "nf4": "bitsandbytes",
}


def main() -> None:
    args = options()
    _, shape, variant = args.part.split("/")
    how, rows, until = size(shape, args.tiny), list[dict[str, Any]](), time.monotonic() + LIMIT - 15
    about = {"model": label(shape, args.tiny), "batch_size": how.batch, "row_tokens": how.length}
    about |= {"scope": how.scope, "recovery_dtype": how.dtype, "recompute": how.recompute, "why": how.why}
    for stage in STAGES:
        rows.append({"stage": stage, **one(args, shape, variant, stage, until)})
        record(args, {**about, "rows": rows})
        print(json.dumps(rows[-1]), flush=True)


def one(args: argparse.Namespace, shape: str, variant: str, stage: str, until: float) -> dict[str, Any]:
    """Figures of one stage, or why there are none."""
    if variant in EXTRA and missing([EXTRA[variant]]):
        return {"error": f"{EXTRA[variant]} is not installed"}
    name = f"{shape}-{variant}-{stage}"
    fresh(args.work, name)
    run, log = command(args, shape, variant, stage), args.work / f"stage-{name}.log"
    began = time.monotonic()
    with log.open("w") as file:
        try:
            status = subprocess.run(
                [sys.executable, "-m", "src.cli", *run], stdout=file, stderr=subprocess.STDOUT,
                env=environment(), timeout=max(1.0, until - began),
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"error": "no time was left"}
    if status:
        words = last_words(log.read_text(errors="replace"))
        return {"refused" if status == 2 else "error": words.removeprefix("error: ")}
    figures = json.loads(result(args.work, name).read_text())
    return {**figures, "wall_seconds": round(time.monotonic() - began, 1)}


if __name__ == "__main__":
    main()
