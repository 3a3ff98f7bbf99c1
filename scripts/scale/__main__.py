"""Measure the parts asked for, and write ``results/strategies.json`` and docs/scale.md: ``make scale``.

Each part is a section of the results and can be measured on its own; finished runs within a part are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scripts import origin
from scripts.scale import converge, equality, grow, plans, teachers
from scripts.scale.page import write
from src.files import write_json

PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "converge": converge.measure,
    "grow": grow.measure,
    "plans": plans.measure,
    "teachers": teachers.measure,
    "equality": equality.measure,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    told = f"{', '.join(PARTS)} (default: all)"
    parser.add_argument("part", nargs="*", metavar="PART", help=told)
    parser.add_argument("--work", type=Path, default=Path("logs/scale"), help="models and runs")
    parser.add_argument("--out", type=Path, default=Path("results/strategies.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/scale.md"), help="whose tables are filled")
    args = parser.parse_args()
    if wrong := [part for part in args.part if part not in PARTS]:
        parser.error(f"{wrong}: no such part; accepted: {', '.join(PARTS)}")
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    args.work.mkdir(parents=True, exist_ok=True)
    for part in args.part or PARTS:
        began = time.monotonic()
        section = {**origin("scale"), **PARTS[part](args.work), "seconds": round(time.monotonic() - began)}
        known = json.loads(args.out.read_text()) if args.out.exists() else {}
        write_json(args.out, {**known, part: section})
        print(f"{part}: done in {section['seconds']} s", flush=True)
    write(json.loads(args.out.read_text()), args.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
