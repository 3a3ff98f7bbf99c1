"""``scripts/search_step.py`` at the size of a 0.6B model: in float32, for the gradients, and in bf16."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

from scripts.gpu.part import environment, options, record

REAL = {
    "vocabulary": 151_936,
    "layers": 28,
    "hidden": 1024,
    "tokens": 512,
    "rows": 4,
    "remove": 7,
    "repeats": 5,
}
TINY = {"vocabulary": 500, "layers": 4, "hidden": 32, "tokens": 32, "rows": 2, "remove": 1, "repeats": 1}


def main() -> None:
    args, rows = options(), []
    sizes = TINY if args.tiny else REAL
    for dtype in ("float32", "bfloat16"):
        out = args.work / f"search-step-{dtype}.json"
        run = [sys.executable, "-m", "scripts.search_step", "--device", args.device, "--dtype", dtype]
        run += [text for key, value in sizes.items() for text in (f"--{key}", str(value))]
        subprocess.run([*run, "--out", str(out)], check=True, env=environment())
        found = json.loads(out.read_text())
        for name, row in found["variants"].items():
            seconds = statistics.median(row.pop("seconds"))
            rows.append({"dtype": dtype, "variant": name, "seconds": seconds, **row})
    record(args, {"settings": found["settings"], "rows": rows})


if __name__ == "__main__":
    main()
