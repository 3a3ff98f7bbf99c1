"""Measure the parts asked for, and write ``results/strategies.json`` and docs/scale.md: ``make scale``.

Each part is a section of the results and can be measured on its own; finished runs within a part are kept.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from scripts.lab.results import JSON, add, options, read
from scripts.scale import converge, equality, grow, plans, teachers
from scripts.scale.page import write

PARTS: dict[str, Callable[[Path], JSON]] = {
    part.__name__.rpartition(".")[2]: part.measure for part in (converge, grow, plans, teachers, equality)
} | {"signals": teachers.signals}


def main() -> None:
    args = options(
        __doc__, parts=PARTS, work=(Path("logs/scale"), "models and runs"),
        out=(Path("results/strategies.json"), "results"),
        page=(Path("docs/scale.md"), "whose tables are filled"),
    )  # fmt: skip
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    args.work.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        began = time.monotonic()
        figures = PARTS[part](args.work)
        add(args.out, part, {**figures, "seconds": round(time.monotonic() - began)})
        print(f"{part}: done", flush=True)
    write(read(args.out), args.page)


if __name__ == "__main__":
    main()
