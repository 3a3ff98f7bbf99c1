"""A tiny teacher with a corpus on disk, and its cache."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lightning import Trainer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from src.cache import CacheTeacher
from src.cache.shards import Precision
from src.data import Corpus
from src.data.arithmetic import build_tokenizer, problem
from tests.tiny import FAMILIES, tiny_model

BARE: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}
"""Settings of a trainer that leaves nothing behind."""


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def small(family: str, seed: int = 0) -> PreTrainedModel:
    """A model of two layers for the arithmetic vocabulary."""
    keys: dict[str, Any] = {"num_hidden_layers": 2, "max_position_embeddings": 256}
    if "layer_types" in FAMILIES[family]:
        keys["layer_types"] = FAMILIES[family]["layer_types"][:2]
    return tiny_model(family, seed, vocab_size=len(tokenizer()), **keys)


@dataclass(frozen=True)
class Workspace:
    root: Path
    family: str

    @property
    def model(self) -> str:
        return str(self.root / "model")

    def corpus(self, **options: Any) -> Corpus:
        options = {"batch_size": 4, "max_length": 256, **options}
        return Corpus(self.model, train=str(self.root / "train.jsonl"), **options)

    def write(
        self,
        out: str,
        precision: Precision = "float16",
        shard_positions: int = 700,
        k: int = 10,
        count_seconds: float = 0.0,
        **corpus: Any,
    ) -> str:
        """Write the cache ``out``; returns its path."""
        path = str(self.root / out)
        module = CacheTeacher(
            self.model, path, k, precision, shard_positions=shard_positions, count_seconds=count_seconds
        )
        Trainer(**BARE).predict(module, datamodule=self.corpus(**corpus))
        return path


def workspace(root: Path, family: str = "llama", rows: int = 48) -> Workspace:
    """Write a tiny model of ``family``, its tokenizer and ``rows`` arithmetic problems under ``root``."""
    rng = random.Random(0)
    tokenizer().save_pretrained(root / "model")
    small(family).save_pretrained(root / "model")
    (root / "train.jsonl").write_text("".join(json.dumps(problem(rng)) + "\n" for _ in range(rows)))
    return Workspace(root, family)
