"""The same global batch for any number of ranks, and callbacks that write down what a run did."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from safetensors.torch import save_file
from torch import Tensor

from src.models.loading import load_tokenizer

Row = tuple[list[int], list[int]]


class GlobalRows(LightningDataModule):
    """Step s takes rows ``[s B, (s + 1) B)`` of the file, over and over; each rank has its own share of them.

    Only answers are supervised, so ranks have different counts of supervised tokens.

    Args:
        tokenizer: directory of the tokenizer.
        train: JSONL of questions and answers.
        validation: not used: validation takes the same rows.
        batch_size: rows of all ranks together.
    """

    def __init__(
        self,
        tokenizer: str | None = None,
        train: str | None = None,
        validation: str | None = None,
        batch_size: int = 8,
    ) -> None:
        super().__init__()
        assert tokenizer
        assert train
        self.tokenizer, self.batch_size = load_tokenizer(tokenizer), batch_size
        self.rows = [self.encode(json.loads(line)) for line in Path(train).read_text().splitlines()]

    def encode(self, row: dict[str, str]) -> Row:
        ids = self.tokenizer(row["question"] + "\n", add_special_tokens=False)["input_ids"]
        said = self.tokenizer(row["answer"], add_special_tokens=False)["input_ids"]
        return ids + said, [-100] * len(ids) + said

    def train_dataloader(self) -> Batches:
        trainer: Any = self.trainer
        return Batches(self.rows, self.batch_size, trainer.global_rank, trainer.world_size, 1000)

    def val_dataloader(self) -> Batches:
        trainer: Any = self.trainer
        return Batches(self.rows, self.batch_size, trainer.global_rank, trainer.world_size, 2)

    predict_dataloader = val_dataloader


class Batches:
    """Batches of one rank, resumable; it has a length, so that Lightning does not read ahead."""

    def __init__(self, rows: list[Row], size: int, rank: int, world: int, count: int) -> None:
        assert size % world == 0, "every rank has as many rows"
        self.rows, self.size, self.rank, self.world, self.count = rows, size, rank, world, count
        self.done = self.first = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        first, self.first = self.first, 0
        own = self.size // self.world
        for number in range(first, self.count):
            self.done = number + 1
            start = number * self.size + self.rank * own
            yield collate([self.rows[i % len(self.rows)] for i in range(start, start + own)])

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.first = state["done"]


def collate(rows: list[Row]) -> dict[str, Tensor]:
    width = max(len(ids) for ids, _ in rows)

    def matrix(lists: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([x + [fill] * (width - len(x)) for x in lists])

    return {
        "input_ids": matrix([ids for ids, _ in rows], 0),
        "attention_mask": matrix([[1] * len(ids) for ids, _ in rows], 0),
        "labels": matrix([labels for _, labels in rows], -100),
    }


class Diary(Callback):
    """Writes ``<directory>/<rank>.json``: each step's loss, logits, asked gates and a digest of the rows."""

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)
        self.steps: list[dict[str, Any]] = []

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.asked: list[list[float]] = []
        policy: Any = getattr(module, "policy", None)
        if policy is not None:
            sample = policy.sample

            def watched(step: int, draw: int) -> Tensor:
                gates = sample(step, draw)
                self.asked.append(gates.tolist())
                return gates

            policy.sample = watched

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        metrics = trainer.callback_metrics
        loss = metrics.get("train/loss", metrics.get("train/kl"))
        assert loss is not None
        policy: Any = getattr(module, "policy", None)
        step = {"loss": float(loss), "rows": int(batch["input_ids"].sum()), "gates": self.asked}
        step["supervised"] = int((batch["labels"][:, 1:] != -100).sum())
        step["logits"] = [] if policy is None else policy.logits.tolist()
        self.asked = []
        self.steps.append(step)
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / f"{trainer.global_rank}.json").write_text(json.dumps(self.steps))


class Weights(Callback):
    """Writes ``<directory>/<rank>.safetensors``: the weights that a rank has trained.

    Args:
        directory: of the run.
    """

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        trained = {name: weight.data for name, weight in module.named_parameters() if weight.requires_grad}
        save_file(trained, self.directory / f"{trainer.global_rank}.safetensors")


class Killed(Callback):
    """Kills the process of one rank, as the machine would, in the middle of a step; notes when.

    Args:
        rank: whose process.
        step: of a training, or the batch of a prediction.
        note: file for the time.
        number: the signal's; 9 is SIGKILL.
    """

    def __init__(self, rank: int, step: int, note: str, number: int = 9) -> None:
        self.rank, self.step, self.note, self.number = rank, step, Path(note), number

    def kill(self, rank: int, step: int) -> None:
        if (rank, step) == (self.rank, self.step):
            self.note.write_text(str(time.time()))
            os.kill(os.getpid(), self.number)

    def on_before_zero_grad(self, trainer: Trainer, *_: Any) -> None:
        self.kill(trainer.global_rank, trainer.global_step)

    def on_predict_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self.kill(trainer.global_rank, batch_idx)
