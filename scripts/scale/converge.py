"""How many steps a search needs at 12, 24 and 48 layers, on small teachers trained for it."""

from __future__ import annotations

import statistics
from pathlib import Path

from scripts.arena.__main__ import main as arena
from scripts.lab.results import JSON, read
from src.cli import run
from src.data.arithmetic import build_tokenizer, write_splits

DEPTHS = (12, 24, 48)
STEPS = 600
"""Of a teacher's training, 32 problems each: enough that its layers differ, far from what it could learn."""
WIDTH = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 2, "num_key_value_heads": 1,
         "head_dim": 32}  # fmt: skip
NEAR = 1.25
"""A search has converged when its mask's KL, and that of every longer one, is within it of the best."""


def measure(work: Path) -> JSON:
    """Steps against the KL of the plain answer, and the smallest number that converges."""
    return {"near": NEAR, "training_steps": STEPS, "depths": [searched(work, depth) for depth in DEPTHS]}


def searched(work: Path, depth: int) -> JSON:
    """Searches of all lengths on one teacher, by the arena."""
    model, name = teach(work, depth), f"scale-{depth}"
    rows = fight("configs/arena/scale.yaml", name, work, "--teacher", str(model))["rows"]
    searches = [row_of(row) for row in rows]
    best = min(kl for row in searches for kl in row["kl"])
    for row in searches:
        row["ratio_to_best"] = statistics.median(row["kl"]) / best
    tried = {row["steps"]: row["ratio_to_best"] for row in searches if row["steps"] is not None}
    far = max((steps for steps, ratio in tried.items() if ratio > NEAR), default=0)
    return {
        "layers": depth, "removed": depth // 4, "searches": searches, "best_kl": best,
        "converged_after": min((n for n in tried if n > far), default=None), "tried": sorted(tried),
    }  # fmt: skip


def fight(plan: str, name: str, work: Path, *more: str) -> JSON:
    """Results of a plan of the arena, with its page and figures in the working directory too."""
    places = [word for key in ("--results", "--docs") for word in (key, str(work))]
    if arena([plan, "--name", name, "--jobs", "1", "--work", str(work / "arena"), *places, *more]):
        raise SystemExit(f"{name}: not all of it ended; what went wrong stands above.")
    return read(work / f"{name}.json")


def row_of(row: JSON) -> JSON:
    """One length of the search: KL on problems it has not seen, and its cost, for each seed."""
    word = row["variant"].removeprefix("steps_")
    searches, kl = [run["search"] for run in row["runs"]], [run["cut"]["kl"] for run in row["runs"]]
    return {
        "title": row["title"], "steps": int(word) if word.isdigit() else None, "kl": kl,
        "forward_tokens": statistics.median(search["metrics"]["forward_tokens"] for search in searches),
        "cpu_seconds": statistics.median(search["cpu_seconds"] for search in searches),
    }  # fmt: skip


def teach(work: Path, depth: int) -> Path:
    """Train a teacher of some depth on the demo's task, unless it is there."""
    model = work / f"teacher-{depth}"
    if (model / "training.json").exists():
        return model
    data, tokenizer = work / "data", work / "tokenizer"
    if not (data / "train.jsonl").exists():
        build_tokenizer().save_pretrained(tokenizer)
        write_splits(data, {"train": 32 * STEPS, "validation": 64})
    keys: dict[str, object] = {
        "model.init_args.tokenizer": tokenizer, "model.init_args.save_to": model,
        "model.init_args.architecture.num_hidden_layers": depth,
        **{f"model.init_args.architecture.{key}": value for key, value in WIDTH.items()},
        "data.init_args.tokenizer": tokenizer, "data.init_args.train": data / "train.jsonl",
        "data.init_args.validation": data / "validation.jsonl",
        "trainer.max_steps": STEPS, "trainer.limit_val_batches": 0, "trainer.val_check_interval": STEPS,
        "trainer.enable_checkpointing": False, "trainer.logger.init_args.save_dir": work / "training",
    }  # fmt: skip
    run(["fit", "--config", "configs/teacher/arithmetic.yaml", *(f"--{k}={v}" for k, v in keys.items())])
    return model
