"""Run the parts asked for, each in a process of its own, into a results file: ``bash scripts/gpu_checks.sh``.

Without a CUDA device it says what it would do and stops with status 0, having written nothing. A part that
fails or takes too long leaves its message in the results; the others run all the same.
"""

from __future__ import annotations

import argparse
import logging
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from pathlib import Path

import torch

from scripts.gpu import laws, speed, stages
from scripts.lab.jobs import Failure, isolated
from scripts.lab.results import JSON, options, origin, read
from src.files import write_json

RESULTS = Path("results/gpu.json")
LIMIT = 470
"""Seconds a part may take before it is stopped and says so."""
PARTS: dict[str, tuple[str, Callable[[argparse.Namespace], JSON]]] = {
    "laws": ("open gates = teacher, hard gates = cut, in bf16", laws.measure),
    "speed": ("prefill and decode of 36 -> 27 layers against the ideal", speed.measure),
}
"""What each part shows, and the function that measures it."""
for shape, variant in product(stages.SHAPES, stages.VARIANTS):
    measured = partial(stages.measure, shape=shape, variant=variant, limit=LIMIT - 15)
    PARTS[f"stages/{shape}/{variant}"] = "search, cache and recovery, a minute each", measured


def main() -> int:
    """Return 0 if all went well or nothing can be done here, 1 if a part failed, 2 for a wrong request."""
    groups = dict.fromkeys(name.rpartition("/")[0] for name in PARTS if "/" in name)
    args = options(
        __doc__, parts=[*PARTS, "stages", *groups], list=(False, "show the parts"), device=("cuda", "used"),
        seconds=(60, "of each stage"), tiny=(False, "tiny shapes, a few steps: a rehearsal; needs --out"),
        out=(RESULTS, "results"), work=(Path("logs/gpu"), "models, data and logs"),
        commit=(None, "of the code, where it is a copy without its repository"),
    )  # fmt: skip
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    parts = chosen(args.parts)
    if args.tiny and args.out == RESULTS:
        print("error: --tiny: a rehearsal is no result. Give --out another file.", file=sys.stderr)
        return 2
    if args.list:
        print("\n".join(f"{name:24} {PARTS[name][0]}" for name in parts))
        return 0
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"no CUDA device: skipped. On one, {len(parts)} part(s) would run: "
              f"{', '.join(parts)}; figures go into {args.out}.")  # fmt: skip
        return 0
    failed = [name for name in parts if not run(name, args)]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def chosen(asked: Iterable[str]) -> list[str]:
    """The parts asked for, by name or by the beginning of it."""
    return list(dict.fromkeys(name for word in asked for name in PARTS if f"{name}/".startswith(f"{word}/")))


def run(name: str, args: argparse.Namespace) -> bool:
    """Run one part within its time; its figures, or the message of its failure, replace the old ones."""
    told, measure = PARTS[name]
    began, log = time.monotonic(), args.work / f"{name.replace('/', '-')}.log"
    print(f"{name}: {told}", flush=True)
    try:
        figures, failure = isolated(measure, args, limit=LIMIT, log=log), ""
    except Failure as e:
        figures, failure = {"error": str(e)}, str(e)
    known = {**read(args.out), name: {**figures, **origin(args.commit), **device(args)}}
    write_json(args.out, {part: known[part] for part in PARTS if part in known})
    print(f"{name}: {failure or 'done'} ({time.monotonic() - began:.0f} s; {log})", flush=True)
    return not failure


def device(args: argparse.Namespace) -> JSON:
    """Name, driver and memory (GiB) of the device; asked without CUDA, which would take memory of it."""
    if not args.device.startswith("cuda"):
        return {"device": platform.machine(), "driver": None, "memory_gib": None}
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]
    told = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    name, driver, mib = (word.strip() for word in told.splitlines()[0].split(","))
    return {"device": name, "driver": driver, "memory_gib": round(int(mib) / 1024, 1)}


if __name__ == "__main__":
    sys.exit(main())
