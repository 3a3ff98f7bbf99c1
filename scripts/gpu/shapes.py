"""Random models of real shapes from the configs on disk, and rows to run them on: no network anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from scripts.lab.benches import middle
from scripts.lab.jobs import isolated
from src.data.arithmetic import build_tokenizer, problems
from src.files import write_text

NAMES = {"0.6b": "qwen3-0.6b", "8b": "qwen3-8b", "llama": "llama-3-8b"}
CONFIGS = {shape: Path(f"configs/models/{name}.json") for shape, name in NAMES.items()}
TINY: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 8, "max_window_layers": 8,
}  # fmt: skip


def label(shape: str, tiny: bool) -> str:
    """How results call a model of this shape."""
    return f"{'tiny ' if tiny else ''}{CONFIGS[shape].stem}"


def random_model(
    shape: str, device: str, dtype: torch.dtype, tiny: bool = False, **changes: Any
) -> PreTrainedModel:
    """A model of a shape in :data:`CONFIGS`, in eval mode, with random weights made on ``device``.

    The weights are twice as large as usual, so that predictions differ from token to token. All but the
    weights is made on the CPU, as in a model that was loaded: a GPU may round rotary frequencies otherwise.
    """
    keys = json.loads(CONFIGS[shape].read_text()) | {"torch_dtype": None}
    keys |= {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}  # the arithmetic tokenizer's
    config = AutoConfig.for_model(**keys | (TINY if tiny else {}) | changes)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()
    model.tie_weights()
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():  # norms are the only vectors of these families
            _ = weight.fill_(1.0) if weight.ndim == 1 else weight.normal_(0.0, 0.04)
    return model


def directory(shape: str, work: Path, device: str, tiny: bool) -> Path:
    """A bf16 checkpoint of that shape with the arithmetic tokenizer, made once.

    A process of its own makes it: this one shall hold no memory of the device that a stage will need.
    """
    path = work / "models" / shape
    if not (path / "tokenizer.json").is_file():  # written last
        isolated(make, shape, path, device, tiny)
    return path


def make(shape: str, path: Path, device: str, tiny: bool) -> None:
    """Write the checkpoint of :func:`directory`."""
    random_model(shape, device, torch.bfloat16, tiny).save_pretrained(path)
    build_tokenizer().save_pretrained(path)


def rows(work: Path, count: int, problems_each: int) -> Path:
    """JSONL of ``count`` long texts, each of several problems; made once."""
    path = work / f"rows-{count}-{problems_each}.jsonl"
    if not path.exists():
        stream = problems("train", count * problems_each, seed=0)
        each = ([" ".join(next(stream).values()) for _ in range(problems_each)] for _ in range(count))
        write_text(path, "".join(json.dumps({"text": "\n".join(told)}) + "\n" for told in each))
    return path


def middle_mask(model: Path, work: Path) -> Path:
    """The mask of :func:`scripts.lab.benches.middle` for a checkpoint, in a file."""
    path = work / f"mask-{model.name}.json"
    middle(str(model), json.loads((model / "config.json").read_text())["num_hidden_layers"]).save(path)
    return path
