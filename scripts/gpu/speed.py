"""Prefill and decode of 36 layers and of 27 of them, against the ideal of the layer count, in bf16."""

from __future__ import annotations

import argparse
import json

import torch

from scripts.gpu.shapes import label, random_model
from scripts.lab.benches import middle
from scripts.lab.results import JSON
from src.benchmark import PHASES, compare
from src.models.cut import cut


def measure(args: argparse.Namespace) -> JSON:
    """Rates and ratios by batch size and phase."""
    long = random_model("8b", args.device, torch.bfloat16, args.tiny).requires_grad_(False)
    layers = long.config.num_hidden_layers
    short = cut(long, middle("", layers))
    prompt, new, repeats = (8, 2, 2) if args.tiny else (512, 64, 10)
    rows = []
    for batch_size in (1, 8) if args.tiny else (1, 8, 64):
        baseline, cut_figures = compare([long, short], batch_size, prompt, new, repeats)
        for phase in PHASES:
            figures = {key: value for key, value in cut_figures[phase].items() if key != "speedups"}
            teacher = baseline[phase]["tokens_per_s"]
            about = {"batch_size": batch_size, "phase": phase, "teacher_tokens_per_s": teacher}
            rows.append(about | figures)
            print(json.dumps(rows[-1]), flush=True)
    return {
        "model": label("8b", args.tiny), "layers": [layers, short.config.num_hidden_layers],
        "prompt_tokens": prompt, "new_tokens": new, "repeats": repeats,
        "attention": long.config._attn_implementation, "rows": rows,
    }  # fmt: skip
