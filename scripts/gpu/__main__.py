"""Run the parts asked for, each in a process of its own, and write the page: ``bash scripts/gpu_checks.sh``.

Without a CUDA device it says what it would do and stops with status 0, having written nothing. A part that
fails or takes too long leaves its message in the results; the others run all the same.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from scripts.gpu.catalogue import CORE, LIMIT, Part, chosen, missing, outside
from scripts.gpu.page import main as write_page
from src.errors import ConfigError

RESULTS, PAGE = Path("results/gpu.json"), Path("docs/gpu.md")


def main() -> int:
    """Return 0 if all went well or nothing can be done here, 1 if a part failed, 2 for a wrong request."""
    args = _parse()
    try:
        parts = chosen(args.part)
        if args.tiny and args.out == RESULTS:
            raise ConfigError("--tiny: a rehearsal is no result. Give --out another file.")
    except ConfigError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    if args.list:
        print("\n".join(f"{part.name:24} {part.what}" for part in parts))
        return 0
    if lacking := missing(CORE):
        print(f"error: {sys.executable} lacks {', '.join(lacking)}. Run `make setup`.", file=sys.stderr)
        return 1
    if args.device.startswith("cuda") and not _cuda():
        print(f"no CUDA device: skipped. On one, {len(parts)} part(s) would run: "
              f"{', '.join(part.name for part in parts)}; figures go into {args.out}.")  # fmt: skip
        return 0
    if other := outside(Path("pyproject.toml")):
        print(f"note: other versions than the project asks for: {', '.join(other)}")
    failed = [part.name for part in parts if not run(part, args)]
    write_page(args.out, PAGE if args.out == RESULTS else args.out.with_suffix(".md"))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def run(part: Part, args: argparse.Namespace) -> bool:
    """Run one part within its time; a message of its failure goes into the results."""
    from scripts.gpu.part import forget, last_words, options, read, record

    if lacking := missing(part.needs):
        print(f"{part.name}: skipped, these packages are missing: {', '.join(lacking)}", flush=True)
        return False
    began, log = time.monotonic(), args.work / f"{part.name.replace('/', '-')}.log"
    print(f"{part.name}: {part.what}", flush=True)
    passed = [part.name, "--device", args.device, "--seconds", str(args.seconds), "--out", str(args.out)]
    passed += ["--work", str(args.work), *(["--tiny"] * args.tiny)]
    passed += ["--commit", args.commit] if args.commit else []
    log.parent.mkdir(parents=True, exist_ok=True)
    forget(args.out, part.name)
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", f"scripts.gpu.{part.module}", *passed],
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            failure = last_words(log.read_text(errors="replace")) if process.wait(LIMIT) else ""
        except subprocess.TimeoutExpired:
            failure = f"stopped after {LIMIT} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    seconds = time.monotonic() - began
    if failure:
        record(options(passed), {**read(args.out).get(part.name, {}), "error": failure})
    print(f"{part.name}: {failure or 'done'} ({seconds:.0f} s; {log})", flush=True)
    return not failure


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bash scripts/gpu_checks.sh",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("part", nargs="*", help="parts, or the beginnings of their names (default: all)")
    add("--list", action="store_true", help="show the parts")
    add("--device", default="cuda")
    add("--seconds", type=int, default=60, help="of each stage (default: 60)")
    add("--tiny", action="store_true", help="tiny shapes, a few steps: a rehearsal; needs --out")
    add("--out", type=Path, default=RESULTS, help=f"results (default: {RESULTS})")
    add("--work", type=Path, default=Path("logs/gpu"), help="models, data and logs (default: logs/gpu)")
    add("--commit", help="of the code, where it is a copy without its repository")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
