"""What each entropy weight does to the demo's score: ``python -m scripts.entropy_weights --mask FILE``.

One cache is written; every weight then recovers the same cut model from it, over seeds of the data's order,
and is judged by exact match on test problems and by the KL from the teacher. Few steps on purpose: with many,
all reach the teacher and nothing is told apart. Adds the section ``weights`` to
``results/teacher_cache.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any, get_args

import torch
from lightning import Trainer, seed_everything
from torch.optim import AdamW

from scripts import origin
from src.cache import CachedCorpus, CacheTeacher
from src.data import Corpus
from src.data.arithmetic import problems
from src.data.columns import Columns
from src.data.judging import batches, encode
from src.evaluate.verb import exact_match, held_out
from src.files import write_json
from src.losses.distill import Distillation
from src.losses.entropy import Weight
from src.mask import Mask
from src.models.loading import load_model, load_tokenizer
from src.recover import Recovery
from src.teachers import CachedTeacher

TEACHER = "assets/arithmetic-teacher"
QUIET: dict[str, Any] = {
    "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
    "enable_model_summary": False, "enable_checkpointing": False,
}  # fmt: skip


def recover(weight: Weight, seed: int, mask: Path, cache: str, steps: int) -> Recovery:
    """One recovery from the cache."""
    seed_everything(seed, verbose=False)
    module = Recovery(
        model=TEACHER,
        mask=str(mask),
        teacher=CachedTeacher(),
        distillation=Distillation(weight=weight),
        optimizer=lambda parameters: AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0),
        final_lr=0.02,
    )
    trainer = Trainer(max_steps=steps, gradient_clip_val=1.0, **QUIET)
    trainer.fit(module, datamodule=CachedCorpus(tokenizer=TEACHER, train=cache, seed=seed))
    return module


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--mask", type=Path, required=True, help="mask.json of a search on the demo's teacher"
    )
    parser.add_argument("--work", type=Path, default=Path("logs/entropy_weights"))
    parser.add_argument("--problems", type=int, default=5_000, help="training problems")
    parser.add_argument("--tests", type=int, default=200, help="test problems")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("results/teacher_cache.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    head = origin("entropy_weights")
    args.work.mkdir(parents=True, exist_ok=True)
    train, cache = args.work / "train.jsonl", str(args.work / "cache")
    train.write_text("".join(json.dumps(row) + "\n" for row in problems("train", args.problems, 7)))
    Trainer(**QUIET).predict(CacheTeacher(TEACHER, cache), datamodule=Corpus(TEACHER, train=str(train)))
    teacher, tokenizer = load_model(TEACHER), load_tokenizer(TEACHER)
    tests = list(problems("test", args.tests, 8))
    encoded = encode(tokenizer, tests, Columns(prompt="question", answer="answer"))
    runs: list[dict[str, Any]] = []
    for seed in args.seeds:
        for weight in get_args(Weight):
            student = recover(weight, seed, args.mask, cache, args.steps).model.eval()
            score = exact_match(student, tokenizer, tests)["exact_match"]
            kl = held_out(student, teacher, batches(encoded, 32, 0))["kl"]
            runs.append({"weight": weight, "seed": seed, "exact_match": score, "kl": kl})
            print(json.dumps(runs[-1]), flush=True)
    table = {}
    for weight in get_args(Weight):
        own = [run for run in runs if run["weight"] == weight]
        table[weight] = {
            key: {
                "mean": statistics.mean(values),
                "sd": statistics.stdev(values) if len(values) > 1 else None,
            }
            for key in ("exact_match", "kl")
            for values in [[run[key] for run in own]]
        }
    section = {
        **head, "removed": list(Mask.load(args.mask).removed), "steps": args.steps,
        "tests": args.tests, "table": table, "runs": runs,
    }  # fmt: skip
    known = json.loads(args.out.read_text()) if args.out.exists() else {}
    write_json(args.out, {**known, "weights": section})


if __name__ == "__main__":
    main()
