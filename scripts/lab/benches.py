"""What the measurements share: a model from nothing, a bare trainer, timings that take turns, peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning import Callback
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from src.mask import Mask

K = TypeVar("K")
BARE: dict[str, Any] = {
    "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
    "enable_model_summary": False, "enable_checkpointing": False,
}  # fmt: skip
"""Keys of a trainer that only trains."""


def qwen(
    vocabulary: int, hidden: int, layers: int, heads: int = 4, dtype: str = "float32", device: str = "cpu",
    **changes: Any,
) -> PreTrainedModel:  # fmt: skip
    """A Qwen3 from config, with weights large enough that its predictions differ from token to token.

    ``changes`` replace keys of its config, ``model_type`` among them.
    """
    keys: dict[str, Any] = {
        "model_type": "qwen3", "vocab_size": vocabulary, "num_hidden_layers": layers, "hidden_size": hidden,
        "intermediate_size": 3 * hidden, "num_attention_heads": heads, "num_key_value_heads": heads // 2,
        "head_dim": hidden // heads, "tie_word_embeddings": True, "initializer_range": 0.06,
    }  # fmt: skip
    config = AutoConfig.for_model(**keys | changes)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


def middle(model: str, layers: int) -> Mask:
    """A mask that removes a quarter of the layers, those behind the middle."""
    kept = (i for i in range(layers) if not layers // 2 <= i < layers // 2 + layers // 4)
    return Mask.by_hand(model, layers, kept)


def in_turns(
    steps: Mapping[K, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.process_time
) -> dict[K, list[float]]:
    """Seconds of each step in each repeat, the steps taking turns, after one round that does not count."""
    seconds: dict[K, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            began = clock()
            step()
            if repeat:
                seconds[name].append(clock() - began)
    return seconds


def against(base: Sequence[float], other: Sequence[float]) -> tuple[float, list[float]]:
    """How many times longer the base took, its median over the repeats and its range."""
    ratios = [a / b for a, b in zip(base, other, strict=True)]
    return statistics.median(ratios), [min(ratios), max(ratios)]


class Clock(Callback):
    """CPU seconds from the first batch to the end of the last."""

    began: float | None = None
    seconds = 0.0

    def _start(self, *_: Any) -> None:
        self.began = self.began or time.process_time()

    def _end(self, *_: Any) -> None:
        self.seconds = time.process_time() - (self.began or 0.0)

    on_train_batch_start = on_predict_batch_start = _start  # type: ignore[assignment]
    on_train_batch_end = on_predict_batch_end = _end  # type: ignore[assignment]


def memory(field: str) -> int:
    """A figure of this process in bytes: ``VmRSS``, or its peak ``VmHWM`` (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def forget_peak() -> None:
    """Let the peak start from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
