"""The paper's claim in miniature: accuracy kept against tokens spent, over seeds: ``make headline``.

For each seed the demo's search runs once; the demo's recovery then runs with a total budget (search and
recovery together) of 0.5, 2, 5, 10 and 20 % of the teacher's own training tokens. Every run is the demo's
Makefile chain in its own directory, so the whole is resumable and finished runs are kept.

Writes ``results/demo.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from src.files import write_json
from src.mask import Mask, git_sha

TEACHER = Path("assets/arithmetic-teacher")
ROW_TOKENS = 68.5
"""Mean tokens of a problem; only used to turn a token budget into steps. Tokens reported are counted."""
BATCH = 32


def make(target: str, run: Path, seed: int, threads: int, recover: str = "") -> None:
    """Bring one artefact of a run up to date."""
    command = ["make", "-s", target, f"RUN={run}", f"SEED={seed}", f"RECOVER={recover}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(run.with_suffix(".log"), "a") as log:
        subprocess.run(command, check=True, env=environment, stdout=log, stderr=log)


def branch(searched: Path, run: Path) -> None:
    """Begin a run with the problems and the search of another one."""
    run.mkdir(parents=True, exist_ok=True)
    if not (run / "search").exists():
        shutil.copytree(searched / "data", run / "data")
        shutil.copy2(searched / ".search", run / ".search")
        shutil.copytree(searched / "search", run / "search")


def one(work: Path, wanted: tuple[int, float], teacher_tokens: int, threads: int) -> dict[str, Any]:
    """Recover with one budget and judge the result."""
    seed, percent = wanted
    run = work / f"seed{seed}-{percent:g}"
    branch(work / f"seed{seed}", run)
    search = json.loads((run / "search/record.json").read_text())
    left = teacher_tokens * percent / 100 - search["tokens"]
    steps = max(1, int(left / (BATCH * ROW_TOKENS)))
    save = f"--trainer.max_steps {steps} --trainer.val_check_interval {steps}"
    make(f"{run}/evaluate.json", run, seed, threads, save)
    judged = json.loads((run / "evaluate.json").read_text())
    named = {"teacher": judged["teacher"]} | {Path(m["path"]).name: m for m in judged["models"]}
    keys = ("exact_match", "kl", "agreement", "parameters")
    recovery = json.loads((run / "recover/record.json").read_text())
    tokens = search["tokens"] + recovery["tokens"]
    row = {
        "seed": seed, "percent": percent, "tokens": tokens, "share": tokens / teacher_tokens,
        "search_tokens": search["tokens"], "seconds": search["seconds"] + recovery["seconds"],
        "removed": list(Mask.load(run / "search/mask.json").removed), "problems": judged["rows"],
        "scores": {name: {key: model[key] for key in keys} for name, model in named.items()},
    }  # fmt: skip
    print(f"seed {seed}, {percent:g} %: {tokens:,} tokens", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--percents", type=float, nargs="*", default=[20, 10, 5, 2, 0.5])
    parser.add_argument("--curve-seeds", type=int, nargs="*", default=[0], help="seeds of the whole curve")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one CPU thread each")
    parser.add_argument("--work", type=Path, default=Path("logs/headline"))
    parser.add_argument("--out", type=Path, default=Path("results/demo.json"))
    args = parser.parse_args()
    teacher_tokens = json.loads((TEACHER / "training.json").read_text())["tokens"]
    args.work.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {seed: args.work / f"seed{seed}" for seed in args.seeds}
        list(pool.map(lambda s: make(f"{runs[s]}/search/mask.json", runs[s], s, 1), args.seeds))
        wanted = [
            (s, p)
            for p in args.percents
            for s in args.seeds
            if p == max(args.percents) or s in args.curve_seeds
        ]
        rows = list(pool.map(lambda sp: one(args.work, sp, teacher_tokens, 1), wanted))
    write_json(
        args.out,
        {
            "command": "python -m scripts.headline " + " ".join(sys.argv[1:]),
            "commit": git_sha(),
            "teacher_training_tokens": teacher_tokens,
            "runs": rows,
        },
    )


if __name__ == "__main__":
    main()
