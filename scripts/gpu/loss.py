"""``scripts/bench_loss.py`` on the device: memory, time and gradients of the chunked and the whole loss."""

from __future__ import annotations

import json
import subprocess
import sys

from scripts.gpu.part import environment, options, record

REAL = ["--tokens", "8192", "--hidden", "1024", "--vocabularies", "32000", "151936"]
TINY = ["--tokens", "256", "--hidden", "16", "--vocabularies", "1000"]


def main() -> None:
    args = options()
    out = args.work / "loss.json"
    run = [sys.executable, "-m", "scripts.bench_loss", "--device", args.device, "--out", str(out)]
    subprocess.run([*run, *(TINY if args.tiny else REAL)], check=True, env=environment())
    found = json.loads(out.read_text())
    record(args, {key: value for key, value in found.items() if key not in ("command", "commit")})


if __name__ == "__main__":
    main()
