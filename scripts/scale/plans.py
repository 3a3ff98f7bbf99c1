"""What the planner says of large models, without a weight: the product's own command, on configs we ship."""

from __future__ import annotations

import json
from pathlib import Path

from scripts.lab.results import JSON
from src.plan.verb import main as plan

STAGES = {"search": ("configs/search/gumbel_topk.yaml", "10M"),
          "recover": ("configs/recover/entropy_kd.yaml", "500M")}  # fmt: skip
"""Config and tokens of a stage."""
MODELS = (("qwen3-0.6b", "4090", (1,)), ("qwen3-8b", "h100", (1, 8)), ("qwen3-32b", "h100", (1, 8)),
          ("deepseek-r1", "h200", (16,)))  # fmt: skip
"""Model, device, and how many of it."""
SLOW = [("deepseek-r1", "recover")]
"""Its 58 x 256 experts take the planner minutes."""


def measure(work: Path) -> JSON:
    """A plan for each case."""
    every = ((model, stage, device, n) for model, device, ns in MODELS for stage in STAGES for n in ns)
    return {"length": 2048, "cases": [case(work, *each) for each in every if each[:2] not in SLOW]}


def case(work: Path, model: str, stage: str, device: str, ranks: int) -> JSON:
    """Memory of a rank, hours and the recommended way."""
    out = work / "plan.json"
    config, tokens = STAGES[stage]
    plan([
        "--config", config, "--model.init_args.model", f"configs/models/{model}.json", "--ratio", "0.25",
        "--device", device, "--devices", str(ranks), "--length", "2048", "--tokens", tokens,
        "--data.init_args.batch_size", "1", "--model.init_args.dtype", "bfloat16", "--json", str(out),
    ])  # fmt: skip
    found = json.loads(out.read_text())
    way = found["recommended"]["way"]
    return {
        "model": model, "stage": stage, "device": device, "ranks": ranks, "tokens": found["tokens"],
        "parameters": found["parameters"], "cache_bytes": found["cache_bytes"]["expected"],
        "way": way, "reason": found["recommended"]["reason"],
    }  # fmt: skip
