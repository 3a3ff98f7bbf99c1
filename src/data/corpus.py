"""Text and prompt-answer corpora as a LightningDataModule.

A batch is ``{"input_ids", "attention_mask", "labels"}``, each ``[B, T]``; ``labels`` equals ``input_ids``
where a token is supervised and -100 elsewhere. Rows of a batch have similar lengths, so little is padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from datasets import Dataset
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Sampler
from transformers import AutoTokenizer

IGNORE = -100
"""Label of a token that is not supervised (the convention of Hugging Face and of torch's cross-entropy)."""


class LengthBatches(Sampler[list[int]]):
    """Batches of rows of similar length, in an order fixed by (seed, epoch).

    The rows are shuffled, cut into pools of 50 batches, sorted by length inside a pool, and the batches
    are shuffled again.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int, shuffle: bool) -> None:
        self.lengths, self.batch_size, self.seed, self.shuffle = lengths, batch_size, seed, shuffle
        self.epoch = 0

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        count, size = len(self.lengths), self.batch_size
        order = torch.randperm(count, generator=generator).tolist() if self.shuffle else list(range(count))
        pool = size * 50
        batches = []
        for start in range(0, count, pool):
            rows = sorted(order[start : start + pool], key=self.lengths.__getitem__)
            batches += [rows[i : i + size] for i in range(0, len(rows), size)]
        mix = torch.randperm(len(batches), generator=generator).tolist() if self.shuffle else range(len(batches))
        for i in mix:
            yield batches[i]


class Corpus(LightningDataModule):
    """A corpus in JSONL files.

    Args:
        tokenizer: Hub id or directory of the tokenizer.
        train: JSONL file to train on.
        validation: JSONL file for validation.
        prompt: column that holds the prompt; its tokens are context. None for plain text.
        answer: column that holds the answer, or the whole text.
        supervise: ``all`` tokens, or those of the ``answer`` only.
        batch_size: rows in a batch.
        max_length: tokens of a row; longer rows are cut.
        seed: seed of the order.
    """

    def __init__(
        self,
        tokenizer: str,
        train: str | None = None,
        validation: str | None = None,
        prompt: str | None = "question",
        answer: str = "answer",
        supervise: Literal["all", "answer"] = "all",
        batch_size: int = 32,
        max_length: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.files = {"train": train, "validation": validation}
        self.prompt, self.answer, self.supervise = prompt, answer, supervise
        self.batch_size, self.max_length, self.seed = batch_size, max_length, seed

    def _rows(self, file: str) -> Dataset:
        eos = self.tokenizer.eos_token_id

        def encode(rows: dict[str, list[str]]) -> dict[str, list[Any]]:
            texts = rows[self.answer]
            prompts = [p + "\n" for p in rows[self.prompt]] if self.prompt else [""] * len(texts)
            heads = self.tokenizer(prompts, add_special_tokens=False).input_ids
            tails = self.tokenizer(texts, add_special_tokens=False).input_ids
            ids = [(h + t + [eos])[: self.max_length] for h, t in zip(heads, tails, strict=True)]
            skip = [len(h) if self.supervise == "answer" else 0 for h in heads]
            return {"input_ids": ids, "skip": skip, "length": [len(row) for row in ids]}

        data = Dataset.from_json(file)
        return data.map(encode, batched=True, remove_columns=data.column_names)

    def _loader(self, split: str, shuffle: bool) -> DataLoader:
        rows = self._rows(self.files[split])
        batches = LengthBatches(list(rows["length"]), self.batch_size, self.seed, shuffle)
        return DataLoader(rows, batch_sampler=batches, collate_fn=self._collate)

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, IGNORE)
        for i, row in enumerate(rows):
            n, skip = len(row["input_ids"]), row["skip"]
            ids[i, :n] = torch.tensor(row["input_ids"])
            mask[i, :n] = 1
            labels[i, skip:n] = ids[i, skip:n]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def train_dataloader(self) -> DataLoader:
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader("validation", shuffle=False)
