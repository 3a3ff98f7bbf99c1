"""What docs/interop.md shows runs: training elsewhere and proving again, and quantisation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from src.cli import run
from src.data.arithmetic import build_tokenizer
from src.mask import Mask
from tests.blocks import run_by
from tests.tiny import tiny_model

pytestmark = pytest.mark.slow
LAYERS = 14
TRAINED, PROVEN, QUANTISED, JUDGED = run_by("tests/integration/test_interop.py")


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, corpus_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parent whose rows are whole blocks of 64 weights, its export of 12 layers, and texts."""
    monkeypatch.chdir(tmp_path)
    tokenizer = build_tokenizer()
    config = {
        "num_hidden_layers": LAYERS, "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 64,
        "num_attention_heads": 4, "head_dim": 16, "layer_types": ["full_attention"] * LAYERS,
        "sliding_window": None, "use_sliding_window": False, "bos_token_id": None, "eos_token_id": 1,
        "pad_token_id": 0,
    }  # fmt: skip
    tiny_model("qwen3", **config).save_pretrained("MODEL")
    tokenizer.save_pretrained("MODEL")
    for text in ("train.jsonl", "held_out.jsonl"):
        Path(text).write_text("".join(Path(corpus_file).read_text().splitlines(keepends=True)[:8]))
    kept = [layer for layer in range(LAYERS) if layer not in (4, 9)]
    Mask.by_hand(str(tmp_path / "MODEL"), LAYERS, kept).save("mask.json")
    run(["export", "--mask", "mask.json", "--out", "my-shorter-model"])


def typed(lines: list[list[str]]) -> None:
    for line in lines:
        if "src.cli" in line:
            run(line[line.index("src.cli") + 1 :])
        else:
            exec(line[line.index("-c") + 1], {})


def weights(directory: str) -> dict[str, torch.Tensor]:
    return load_file(Path(directory, "model.safetensors"))


def test_what_trl_trained_is_proven_again() -> None:
    pytest.importorskip("trl", reason="needs the extra trl")
    code = TRAINED.text.replace("max_steps=20", "max_steps=1").replace("length=96", "length=4")
    exec(code.replace("learning_rate=1e-5", "learning_rate=0.01"), {})
    typed(PROVEN.lines)
    before, trained, proven = map(weights, ("my-shorter-model", "trained-on", "proven"))
    assert trained.keys() == proven.keys()
    assert all(torch.equal(trained[name], proven[name]) for name in trained)
    assert not all(torch.equal(trained[name], before[name]) for name in trained)
    assert Path("trained-on/training_args.bin").exists()
    assert not list(Path("proven").glob("*.bin")), "nothing that would be unpickled goes along"
    assert "my-shorter-model" in Path("interop.json").read_text()


def test_what_is_quantised_is_judged_beside_the_parent() -> None:
    exec(QUANTISED.text, {})
    typed(JUDGED.lines)
    kinds = {name: {tensor.dtype for tensor in weights(name).values()} for name in ("int8", "nf4")}
    assert torch.int8 in kinds["int8"]
    assert torch.uint8 in kinds["nf4"]
    found = json.loads(Path("quantised.json").read_text())["models"]
    judged = {model["path"]: model["kl"] for model in found}
    assert list(judged) == ["my-shorter-model", "int8", "nf4"]
    exact = judged["my-shorter-model"]
    assert abs(judged["int8"] - exact) < abs(judged["nf4"] - exact)
