"""The headline at scale: a 32-layer teacher trained here, a quarter of it removed, for 2 % of its tokens.

``headline/teacher`` trains it (configs/teacher/deep.yaml) and judges it; each ``headline/seedN`` searches,
recovers, exports and judges beside it, by the demo's configs. The share counts every token of search and
recovery.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from scripts.gpu.part import environment, options, record
from src.errors import ConfigError
from src.mask import Mask

SHARE = 0.02
"""Of the teacher's training tokens, for search and recovery together."""
BATCH, ROW_TOKENS = 32, 68.5
"""Rows of a recovery's batch and mean tokens of a row, to turn tokens into steps."""
TINY_TEACHER = {
    "num_hidden_layers": 4, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip


def main() -> None:
    args = options()
    folder = args.work / "headline"
    what = args.part.partition("/")[2]
    figures = (
        teach(args, folder) if what == "teacher" else shorten(args, folder, int(what.removeprefix("seed")))
    )
    record(args, figures)


def run(module: str, *arguments: object) -> None:
    """Run a command of the product; its output goes where this part's goes."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    subprocess.run(command, check=True, env=environment())


def fit(args: argparse.Namespace, config: str, log: Path, *arguments: object) -> None:
    """Train by a shipped config, logging into a fixed directory."""
    where = ["--trainer.logger.init_args.save_dir", log.parent, "--trainer.logger.init_args.name", log.name]
    where += ["--trainer.logger.init_args.version", "", "--trainer.accelerator", kind(args)]
    run("src.cli", "fit", "--config", config, *where, *arguments)


def kind(args: argparse.Namespace) -> str:
    return "gpu" if args.device.startswith("cuda") else "cpu"


def teach(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train the teacher within the part's time and judge it."""
    data, tokenizer, model = folder / "data", folder / "tokenizer", folder / "model"
    sizes = (300, 8, 8) if args.tiny else (300_000, 512, 1000)
    given = [text for pair in zip(("--train", "--validation", "--test"), sizes, strict=True) for text in pair]
    run("src.data.arithmetic", "--out", data, "--tokenizer", tokenizer, *given)
    keys: dict[str, object] = {
        "model.init_args.tokenizer": tokenizer, "model.init_args.save_to": model,
        "data.init_args.tokenizer": tokenizer, "data.init_args.train": data / "train.jsonl",
        "data.init_args.validation": data / "validation.jsonl", "trainer.max_time": "00:00:05:30",
    }  # fmt: skip
    if args.tiny:
        keys |= {f"model.init_args.architecture.{key}": value for key, value in TINY_TEACHER.items()}
        keys |= {"trainer.max_steps": 3, "trainer.val_check_interval": 3, "data.init_args.batch_size": 4}
        keys["data.init_args.num_workers"] = 0
    fit(args, "configs/teacher/deep.yaml", folder / "teacher", *(f"--{k}={v}" for k, v in keys.items()))
    judged = judge(args, folder, folder / "teacher.json", "--model", model)
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    training = json.loads((model / "training.json").read_text())
    return {
        **training,
        "layers": layers,
        "problems": judged["rows"],
        "exact_match": judged["models"][0]["exact_match"],
    }


def shorten(args: argparse.Namespace, folder: Path, seed: int) -> dict[str, Any]:
    """Search, recover, export and judge with one seed.

    Raises:
        ConfigError: there is no teacher yet.
    """
    teacher, data, home = folder / "model", folder / "data", folder / f"seed{seed}"
    if not (teacher / "training.json").is_file():
        raise ConfigError("headline: there is no teacher. Run the part headline/teacher first.")
    shutil.rmtree(home, ignore_errors=True)  # beside an old last.ckpt a new one gets another name
    total = json.loads((teacher / "training.json").read_text())["tokens"]
    common: dict[str, object] = {
        "model.init_args.model": teacher, "data.init_args.tokenizer": teacher, "seed_everything": seed,
        "data.init_args.train": data / "train.jsonl", "data.init_args.validation": data / "validation.jsonl",
    }  # fmt: skip
    keys = common | {"data.init_args.seed": seed, "model.init_args.policy.init_args.seed": seed}
    keys["trainer.max_steps"] = 2 if args.tiny else 60
    if args.tiny:
        keys |= {"model.init_args.calibration_batches": 1, "data.init_args.batch_size": 2}
    fit(args, "configs/demo/search.yaml", home / "search", *(f"--{k}={v}" for k, v in keys.items()))
    search = json.loads((home / "search/record.json").read_text())
    steps = max(2, int((0.99 * SHARE * total - search["tokens"]) / (BATCH * ROW_TOKENS)))
    mask = home / "search/mask.json"
    keys = common | {
        "data.init_args.seed": 100 + seed,
        "model.init_args.mask": mask,
        "trainer.max_steps": steps,
    }
    keys |= {"trainer.limit_val_batches": 0, "trainer.val_check_interval": steps}
    fit(args, "configs/demo/recover.yaml", home / "recover", *(f"--{k}={v}" for k, v in keys.items()))
    recovery = json.loads((home / "recover/record.json").read_text())
    run("src.cli", "export", "--mask", mask, "--out", home / "cut", "--force")
    checkpoint = home / "recover/checkpoints/last.ckpt"
    run(
        "src.cli",
        "export",
        "--mask",
        mask,
        "--checkpoint",
        checkpoint,
        "--out",
        home / "recovered",
        "--force",
    )
    models = ("--teacher", teacher, "--model", home / "cut", home / "recovered")
    judged = judge(args, folder, home / "evaluate.json", *models)
    scores = dict(zip(("teacher", "cut", "recovered"), [judged["teacher"], *judged["models"]], strict=True))
    tokens = search["tokens"] + recovery["tokens"]
    return {
        "seed": seed, "removed": list(Mask.load(mask).removed), "layers": judged["teacher"]["layers"],
        "tokens": tokens, "share": tokens / total, "search_tokens": search["tokens"],
        "seconds": search["seconds"] + recovery["seconds"], "problems": judged["rows"],
        "exact_match": {name: score["exact_match"] for name, score in scores.items()},
    }  # fmt: skip


def judge(args: argparse.Namespace, folder: Path, out: Path, *models: object) -> dict[str, Any]:
    """Exact match of models on the test problems."""
    test = folder / "data/test.jsonl"
    run("src.cli", "evaluate", *models, "--data", test, "--device", args.device, "--out", out)
    return json.loads(out.read_text())


if __name__ == "__main__":
    main()
