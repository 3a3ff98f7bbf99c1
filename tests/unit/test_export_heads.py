"""Multi-token-prediction heads: no causal-LM class holds them, so the export drops them and says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from src.export import verb as export
from src.mask import Mask
from tests.families import tiny_config


@pytest.mark.parametrize(
    ("settings", "tensors", "told"),
    [
        ({"mtp_num_hidden_layers": 2}, (), 2),
        ({}, ("mtp.fc.weight", "mtp.layers.0.mlp.up_proj.weight"), 1),
        ({}, ("model.layers.7.eh_proj.weight", "model.layers.8.eh_proj.weight"), 2),
        ({}, (), 0),
    ],
)
def test_heads_are_left_out_and_the_card_says_so(
    settings: dict[str, int],
    tensors: tuple[str, ...],
    told: int,
    tmp_path: Path,
) -> None:
    parent, out = tmp_path / "parent", tmp_path / "out"
    AutoModelForCausalLM.from_config(tiny_config("qwen3_5_text")).save_pretrained(parent)
    weights = load_file(parent / "model.safetensors")
    save_file(weights | {n: torch.ones(2) for n in tensors}, parent / "model.safetensors", {"format": "pt"})
    config = json.loads((parent / "config.json").read_text())
    (parent / "config.json").write_text(json.dumps(config | settings))
    Mask(model=str(parent), num_layers=7, keep=(0, 1, 3, 4, 5, 6), method="x").save(tmp_path / "mask.json")
    export.main(["--mask", str(tmp_path / "mask.json"), "--out", str(out)])
    row = f"| Left out | {told} multi-token-prediction layers"
    assert (row in (out / "README.md").read_text()) == bool(told)
    assert not json.loads((out / "config.json").read_text()).get("mtp_num_hidden_layers")
