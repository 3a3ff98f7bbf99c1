"""Planned against measured peak memory on a CPU: ``python -m scripts.plan_accuracy`` -> results/plan.json.

Each case is the real command (``fit`` or ``predict``) on a random model, in a process of its own. What is
measured is the kernel's record of the largest resident memory (VmHWM) less the resident memory before: after
all imports, and after the same command has run once on a model of 16 hidden units, so that what a first run
leaves behind (libraries, thread stacks, caches) does not count. Weights that safetensors maps from the file
count as resident, as they should: they are read.

glibc keeps freed blocks for itself, up to 32 MB each, which adds what depends on the history of the process.
For the comparison each freed tensor goes back to the kernel (MALLOC_MMAP_THRESHOLD_); the cases marked
``default`` are measured with the allocator as it comes, and are outside the largest error.
"""

from __future__ import annotations

import ctypes
import gc
import json
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from scripts.lab.benches import Clock, forget_peak, memory, middle, qwen
from scripts.lab.jobs import isolated
from scripts.lab.results import JSON, add, options
from src.cli import run
from src.data.arithmetic import build_tokenizer
from src.models.layers import num_layers
from src.models.loading import load_config
from src.plan.devices import device
from src.plan.experiment import Experiment
from src.plan.memory import OVERHEAD
from src.plan.planner import Planner

BAR = 0.10
DOCUMENTS = 64
PLAN = yaml.safe_load(Path("configs/plan_accuracy.yaml").read_text())
SHAPES, CONFIGS = PLAN["shapes"], PLAN["configs"]


@dataclass(frozen=True)
class Case:
    """A stage on a model: ``rows x length`` tokens, further keys."""

    name: str
    stage: str
    model: str
    rows: int
    length: int
    keys: tuple[str, ...] = ()
    default_malloc: bool = False


CASES = [Case(**case) for case in PLAN["cases"]]


def prepare(work: Path) -> None:
    """Random models with a tokenizer, masks that remove a quarter, and documents longer than any row."""
    ids: JSON = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    for model in {"tiny", "tiny-llama", *(case.model for case in CASES)}:
        (shape, _, family), path = model.partition("-"), work / model
        qwen(**SHAPES[shape], model_type=family or "qwen3", **ids).save_pretrained(path)
        build_tokenizer().save_pretrained(path)
        middle(str(path), SHAPES[shape]["layers"]).save(f"{path}.json")
    numbers = random.Random(0)
    with (work / "text.jsonl").open("w") as file:
        for _ in range(DOCUMENTS):
            text = " ".join(str(numbers.randrange(100)) for _ in range(800))
            file.write(json.dumps({"text": text}) + "\n")


def arguments(case: Case, work: Path, model: str) -> list[str]:
    """What follows ``fit`` or ``predict``."""
    path = str(work / model)
    keys = {
        "data.init_args.tokenizer": path, "data.init_args.train": work / "text.jsonl",
        "data.init_args.batch_size": case.rows, "data.init_args.max_length": case.length,
        "trainer.accelerator": "cpu", "trainer.logger": "false", "trainer.enable_checkpointing": "false",
        "trainer.callbacks": "scripts.lab.benches.Clock", "trainer.enable_progress_bar": "false",
        "trainer.max_steps": 1 if case.stage == "search" else 2, "trainer.limit_val_batches": 0,
        "trainer.limit_predict_batches": 2, "trainer.default_root_dir": work / "runs",
    }  # fmt: skip
    stages: dict[str, JSON] = {key: {"mask": f"{path}.json"} for key in ("recover", "cached")}
    stages["search"] = {"model": path, "draws": 2}
    stages["cache"] = {"model": path, "out": work / "cache" / model, "count_seconds": 0}
    if case.stage == "cached":
        keys["data.init_args.train"] = work / "cache" / model
        del keys["data.init_args.max_length"]
    elif case.stage != "cache":
        keys["data.init_args.validation"] = work / "text.jsonl" if case.stage == "search" else "null"
    keys |= {f"model.init_args.{key}": value for key, value in stages[case.stage].items()}
    argv = [part for config in CONFIGS[case.stage] for part in ("--config", config)]
    return [*argv, *(f"--{key}={value}" for key, value in keys.items()), *(f"--{key}" for key in case.keys)]


def measure(case: Case, work: Path) -> dict[str, float]:
    """Run the case in this process, after a tiny one."""
    torch.set_num_threads(1)
    verb = "predict" if case.stage == "cache" else "fit"
    run([verb, *arguments(case, work, "tiny-llama" if "llama" in case.model else "tiny")])
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    forget_peak()
    before = memory("VmRSS")
    callbacks = run([verb, *arguments(case, work, case.model)]).trainer.callbacks
    clock = next(found for found in callbacks if isinstance(found, Clock))
    return {"measured": memory("VmHWM") - before, "baseline": before, "cpu_seconds": clock.seconds}


def planned(case: Case, work: Path) -> JSON:
    """What the planner says of the same arguments."""
    experiment = Experiment(arguments(case, work, case.model), length=case.length)
    tokens = 2 * case.rows * case.length if case.stage == "cache" else None
    planner = Planner(experiment, device("cpu"), tokens=tokens)
    found, traced = planner.configured, planner.trace()
    return {
        "parameters": traced.parent, "parts": found.parts, "planned": found.total - found.parts[OVERHEAD],
        "planned_cpu_seconds": planner.device.seconds(traced.flops * planner.steps, "float32"),
    }  # fmt: skip


def compare(case: Case, work: Path) -> JSON:
    """Measure in a fresh process, plan in this one."""
    env = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not case.default_malloc:
        env |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found = isolated(measure, case, work, env=env, log=work / "log")
    plan = planned(case, work)
    return {
        "case": case.name, "model": case.model, "layers": num_layers(load_config(str(work / case.model))),
        "rows": case.rows, "length": case.length, "malloc": "default" if case.default_malloc else "returns",
        **plan, **found, "error": plan["planned"] / found["measured"] - 1,
    }  # fmt: skip


def main() -> None:
    args = options(__doc__, out=(Path("results/plan.json"), "results"))
    torch.set_num_threads(1)
    began, cases = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for case in CASES:
            cases.append(row := compare(case, Path(folder)))
            sizes = f"planned {row['planned'] / 1e6:7.1f} MB, measured {row['measured'] / 1e6:7.1f} MB"
            print(f"{row['case']:36} {row['malloc']:8} {sizes}, {row['error']:+.1%}", flush=True)
    largest = max(abs(row["error"]) for row in cases if row["malloc"] == "returns")
    add(args.out, "accuracy", {
        "measured": "bytes: largest resident memory (VmHWM) less that after imports and a tiny run",
        "bar": BAR, "largest_error": largest, "seconds": time.monotonic() - began, "cases": cases,
    })  # fmt: skip
    print(f"largest error {largest:.1%}; accepted: {BAR:.0%}")


if __name__ == "__main__":
    main()
