"""Tiny models to plan for, and planners of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from src.plan.devices import Device
from src.plan.experiment import Experiment
from src.plan.planner import Planner

H, MLP, L, HEADS, KV, D, V = 8, 16, 4, 2, 1, 4, 32
LAYER = 2 * H * HEADS * D + 2 * H * KV * D + 2 * D + 3 * H * MLP + 2 * H
"""Weights of a layer: queries and output, keys and values, their norms, the three of the MLP, two norms."""
ROWS, LENGTH = 4, 64
SEARCH, RECOVER, CACHE = (
    "configs/search/gumbel_topk.yaml",
    "configs/recover/entropy_kd.yaml",
    "configs/cache/topk.yaml",
)
ONE_ROW = {"data.init_args.batch_size": 1, "model.init_args.ratio": "null"}
"""A single row is never padded: its attention needs no mask."""
PLENTY = Device("h100", "test", 1 << 50, {"float32": 1.0, "bfloat16": 2.0}, 0.5, 0, 0.0, "none")


def write_config(path: Path, layers: int = L, **keys: Any) -> str:
    """A config alone: there are no weights that could be loaded."""
    config = AutoConfig.for_model(
        "qwen3", vocab_size=V, hidden_size=H, intermediate_size=MLP, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=KV, head_dim=D, tie_word_embeddings=True, **keys,
    )  # fmt: skip
    path.write_text(config.to_json_string())
    return str(path)


def planner_of(
    tmp_path: Path, config: str, layers: int = L, spec: Device = PLENTY, ranks: int | None = None, **keys: Any
) -> Planner:
    """Planner of a shipped config on a tiny model; keys are those of the command line."""
    argv = [
        "--config",
        config,
        f"--model.init_args.model={write_config(tmp_path / f'{layers}.json', layers)}",
    ]
    keys = {"data.init_args.batch_size": ROWS, "data.init_args.max_length": LENGTH, **keys}
    argv += [f"--{key}={value}" for key, value in keys.items()]
    ratio = 1 / layers if config == RECOVER else None
    return Planner(Experiment(argv, ratio), spec, ranks, 1_000_000 if config == CACHE else None)


def forward_flops(layers: int) -> int:
    """Operations of the real model on a batch of full rows, without logits of the last token."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        "qwen3", vocab_size=V, hidden_size=H, intermediate_size=MLP, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=KV, head_dim=D, attn_implementation="eager",
    ))  # fmt: skip
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones(ROWS, LENGTH, dtype=torch.long), use_cache=False)
    return int(counter.get_total_flops()) - 2 * ROWS * H * V
