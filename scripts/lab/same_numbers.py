"""Does this tree compute what an older commit computed, to the last bit?

``python -m scripts.lab.same_numbers COMMIT [--quick]`` checks out the commit and what is here now, runs the
same command lines in both (data, search, recovery in full, by adapters and from a cache, exports, evaluation)
and compares what they wrote. Only command lines and files are compared, so modules may move. Each tree reads
its own configs; a field that one of two JSON files lacks is named, not compared. Exit status 1: a difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from scripts.lab.results import JSON, TEACHER
from src.training.checkpoints import weights

ROOT = Path(__file__).parents[2]
DRIVER = "import json, sys; from src.cli import main; [main(line) for line in json.loads(sys.argv[1])]"
SETTINGS: dict[str, JSON] = {
    "demo": {"rows": (40000, 256, 500), "search": [], "recover": [], "short": 40},
    "quick": {"rows": (300, 32, 24),
              "search": ["--trainer.max_steps=6", "--model.init_args.calibration_batches=2"],
              "recover": ["--trainer.max_steps=8", "--data.init_args.batch_size=8"], "short": 4},
}  # fmt: skip
"""Rows (train, validation, test), overrides of the demo's configs, steps of the side runs."""
LAST = "{}/{}/checkpoints/last.ckpt"
NOT_NUMBERS = {"git_sha", "commit", "command", "seconds", "path", "torch"}
"""Fields of JSON files that say where and how fast they were made."""


def lines(out: Path, given: JSON) -> list[list[str]]:
    """The command lines, without ``python -m src.cli``, that write everything below ``out``."""
    mask, log = f"{out}/search/mask.json", f"--trainer.logger.init_args.save_dir={out}"
    train, held_out = (f"--data.init_args.{name}={out}/data/{name}.jsonl" for name in ("train", "validation"))
    search = ["fit", "--config=configs/demo/search.yaml", log, train, held_out, *given["search"]]
    recover = ["fit", "--config=configs/demo/recover.yaml", f"--model.init_args.mask={mask}", log]
    short = f"--trainer.max_steps={given['short']}"
    rows = f"--data.init_args.train={out}/data/validation.jsonl"
    cache = ["predict", "--config=configs/cache/topk.yaml", log, f"--model.init_args.out={out}/cache", rows]
    once = ["fit", "--config=configs/demo/read_once.yaml", *recover[2:]]  # no cache serves the demo's terms
    from_cache = ["--config=configs/cache/recover.yaml", f"--data.init_args.train={out}/cache"]
    lora = ["--model.init_args.scope=lora", short, "--trainer.logger.init_args.name=lora"]
    made = {"cut": [], **{name: ["--checkpoint", LAST.format(out, name)] for name in ("recover", "cached")}}
    judge = ["evaluate", "--teacher", TEACHER, "--data", f"{out}/data/test.jsonl", "--supervise", "all"]
    return [
        search,
        [*recover, train, held_out, *given["recover"]],
        [*recover, train, held_out, *given["recover"], *lora],
        cache,
        [*once, *from_cache, *given["recover"], short, "--trainer.logger.init_args.name=cached"],
        *(["export", "--mask", mask, "--out", f"{out}/export/{name}", *made[name]] for name in made),
        [*judge, "--model", *(f"{out}/export/{name}" for name in made), "--out", f"{out}/evaluate.json"],
    ]


def run(tree: Path, out: Path, given: JSON) -> None:
    """Run the pipeline with the code of ``tree``."""
    rows = [f"--{name}={n}" for name, n in zip(("train", "validation", "test"), given["rows"], strict=True)]
    env = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ, "PYTHONPATH": str(tree)}
    for words in (
        ["-m", "src.data.arithmetic", "--out", f"{out}/data", *rows, "--seed", "1000"],
        ["-c", DRIVER, json.dumps(lines(out, given))],
    ):
        with (out / "log.txt").open("a") as log:
            done = subprocess.run([sys.executable, *words], cwd=tree, env=env, stdout=log, stderr=log)
        if done.returncode:
            print((out / "log.txt").read_text()[-3000:])
            raise SystemExit(f"{tree}: a command ended with {done.returncode}; its last words are above")


def git(*words: str) -> str:
    """What git says."""
    done = subprocess.run(["git", "-C", str(ROOT), *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def leaves(value: Any, name: str = "") -> JSON:
    """The numbers and texts of nested JSON by their path."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        found = [leaves(v, f"{name}.{k}".strip(".")) for k, v in items if k not in NOT_NUMBERS]
        return {key: leaf for part in found for key, leaf in part.items()}
    return {name: value}


def digests(tensors: dict[str, Tensor]) -> dict[str, str]:
    """A digest of each tensor: type, shape and bytes."""
    raw = {name: (t, t.contiguous().numpy().tobytes()) for name, t in tensors.items()}
    return {n: f"{t.dtype}{list(t.shape)}{hashlib.sha256(b).hexdigest()[:16]}" for n, (t, b) in raw.items()}


def written(out: Path) -> dict[str, JSON]:
    """What a run wrote, part by part, as values that are equal when the bits are."""
    parts = {"mask.json": leaves(json.loads((out / "search" / "mask.json").read_text()))}
    for name in ("recover", "lora", "cached"):
        parts[f"{name}: weights"] = digests(weights(LAST.format(out, name)))
    shards = sorted(p for p in (out / "cache").rglob("*") if p.suffix == ".parquet")
    parts["cache: shards"] = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in shards}
    for path in sorted((out / "export").glob("*/*.safetensors")):
        parts[f"export {path.parent.name}: {path.name}"] = digests(load_file(path))
    parts["evaluate.json"] = leaves(json.loads((out / "evaluate.json").read_text()))
    return parts


def compare(old: dict[str, JSON], new: dict[str, JSON]) -> tuple[list[str], int]:
    """A line for each part, and how many differ. Of JSON only shared fields count, of the rest all."""
    told, wrong = list[str](), 0
    for part in dict.fromkeys([*old, *new]):
        a, b = old.get(part, {}), new.get(part, {})
        alone = sorted(a.keys() ^ b.keys())
        differ = [f"{k} ({a[k]} -> {b[k]})"[:200] for k in sorted(a.keys() & b.keys()) if a[k] != b[k]]
        if not part.endswith(".json") or not (a.keys() & b.keys()):
            differ, alone = [*differ, *(f"{k} on one side only" for k in alone)], []
        wrong += bool(differ)
        result = f"{len(differ)} differ: {'; '.join(differ[:4])}" if differ else "equal"
        note = f"; on one side only: {', '.join(alone)}" if alone else ""
        told.append(f"{part:40} {len(a.keys() & b.keys()):5} compared, {result}{note}")
    return told, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("commit", help="the older commit")
    parser.add_argument("--quick", action="store_true", help="a few steps instead of the demo's own settings")
    args = parser.parse_args()
    given = SETTINGS["quick" if args.quick else "demo"]
    now = git("stash", "create") or "HEAD"  # what is not committed counts, but for files git does not know
    found = []
    with ExitStack() as ends:
        ends.callback(git, "worktree", "prune")  # once the directories of the two trees are gone
        temporary = ends.enter_context(tempfile.TemporaryDirectory(prefix="same_numbers."))
        for name, commit in ("old", args.commit), ("new", now):
            tree, out = Path(temporary, f"{name}.tree"), Path(temporary, name)
            out.mkdir()
            git("worktree", "add", "--detach", str(tree), commit)
            run(tree, out, given)
            found.append(written(out))
    told, wrong = compare(*found)
    print(*told, sep="\n")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
