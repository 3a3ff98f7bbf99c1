"""Text, prompt-answer and chat corpora, streamed, as a LightningDataModule.

A batch is a dict of ``[B, T]`` int64 tensors. Padded rows have ``input_ids``, ``attention_mask`` and
``labels``; packed rows have ``input_ids``, ``position_ids`` and ``labels`` (see :mod:`src.data.batches`).
``labels`` equals ``input_ids`` where a token is supervised and -100 elsewhere; it is not shifted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from lightning import LightningDataModule

from src.data.batches import Batch, Packed, Padded
from src.data.documents import Columns
from src.data.encode import Encoder, TooLong
from src.data.loader import Loader, across_ranks, alone
from src.data.reader import Corpora, State
from src.data.sources import Source, check_weights
from src.data.statistics import Statistics
from src.data.stream import LANES, Recipe
from src.errors import ConfigError
from src.models.loading import load_tokenizer

Sources = str | list[str | Source]


class Corpus(LightningDataModule):
    """A corpus, streamed: nothing is stored, every order is fixed by the seed, and training resumes exactly.

    Args:
        tokenizer: Hub id or directory of the tokenizer.
        train: what to train on: a Hub id, file, glob, URL, directory or saved dataset; or a list of them; or
            a list of sources with weights.
        validation: what to validate on, in the same forms.
        held_out: share of the documents of ``train`` set apart for validation, instead of ``validation``.
        columns: which columns hold what; by default well-known names are looked for.
        separator: text between prompt and answer.
        supervise: ``all`` tokens, or only those of the ``answer`` (what the assistant says, in a chat).
        packing: ``padded`` rows of one document each, or rows of whole ``documents`` that do not see each
            other.
        batch_size: rows of a batch, at most.
        max_length: tokens of a row.
        too_long: what becomes of a longer document: ``truncate`` it, ``split`` it, or stop with an ``error``.
        bos: begin with the tokenizer's BOS; by default as the tokenizer itself does. Chats: as their template.
        eos: end with the tokenizer's EOS. Chats: as their template.
        max_tokens: tokens to train on, over all ranks and epochs, such as 500M; by default no limit.
        shuffle_buffer: documents shuffled together by each rank.
        num_workers: worker processes of each rank: 0 (read in this process), 1, 2 or 4; changes no batch.
        seed: seed of the order.
    """

    def __init__(
        self,
        tokenizer: str,
        train: Sources | None = None,
        validation: Sources | None = None,
        held_out: float = 0.0,
        columns: Columns | None = None,
        separator: str = "\n",
        supervise: Literal["all", "answer"] = "all",
        packing: Literal["padded", "documents"] = "padded",
        batch_size: int = 32,
        max_length: int = 256,
        too_long: TooLong = "truncate",
        bos: bool | None = None,
        eos: bool = True,
        max_tokens: int | str | None = None,
        shuffle_buffer: int = 8192,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check(held_out, validation, num_workers, batch_size, max_length)
        self.tokenizer = load_tokenizer(tokenizer)
        self.train, self.validation = _sources(train, "data.train"), _sources(validation, "data.validation")
        self.held_out, self.columns, self.separator = held_out, columns or Columns(), separator
        self.encoder = Encoder(self.tokenizer, max_length, supervise, too_long, bos, eos)
        rows = Packed if packing == "documents" else Padded
        self.batching = rows(batch_size, max_length, self.tokenizer.pad_token_id)
        self.max_tokens = _count(max_tokens)
        self.shuffle_buffer, self.num_workers, self.seed = shuffle_buffer, num_workers, seed
        self.order = {
            "tokenizer": len(self.tokenizer), "train": [Path(s.path).name for s in self.train],
            "held_out": held_out, "separator": separator, "supervise": supervise, "packing": packing,
            "batch_size": batch_size, "max_length": max_length, "too_long": too_long, "eos": eos,
            "shuffle_buffer": shuffle_buffer, "seed": seed,
        }  # fmt: skip
        self._loader: Loader | None = None
        self._resume: list[State] | None = None

    def loader(self, split: Literal["train", "validation"], shuffle: bool, **options: Any) -> Loader:
        """The loader of a split; ``options`` are those of :class:`src.data.loader.Loader`."""
        apart = split == "validation" and self.held_out > 0
        sources = self.train if split == "train" or apart else self.validation
        if not sources:
            raise ConfigError(f"data.{split} is not set; name a file, a Hub id or a list of sources.")
        corpora = Corpora(sources, self.columns, self.separator, self.tokenizer, self.held_out, apart)
        recipe = Recipe(corpora, self.encoder, self.batching, self.shuffle_buffer, shuffle, self.seed)
        return Loader(recipe, **options)

    def train_dataloader(self) -> Loader:
        """Shuffled, from where a checkpoint left off; every iteration is the next epoch."""
        ranks = self._ranks()
        position = self._resume[ranks["rank"]] if self._resume else None
        self._loader = self.loader(
            "train", shuffle=True, max_tokens=self.max_tokens, position=position, **ranks
        )
        if self._loader.position["finished"]:
            self.trainer.should_stop = True
        return self._loader

    def val_dataloader(self) -> Loader | list[Any]:
        """Every document once, in the order of the files and of their lengths; nothing if none is set."""
        if not self.validation and not self.held_out:
            return []
        return self.loader("validation", shuffle=False, **self._ranks())

    def predict_dataloader(self) -> Loader:
        """The training documents, each once, in a fixed order, for a pass of the teacher over them."""
        return self.loader("train", shuffle=False, **self._ranks())

    @property
    def statistics(self) -> Statistics:
        """What this rank was trained on so far."""
        return self._loader.statistics if self._loader else Statistics()

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Called by Lightning as a batch is handed to training: the position moves, and stops at the limit."""
        if self.trainer is not None and self.trainer.training and self._loader is not None:
            self._loader.handed()
            self.trainer.should_stop |= self._loader.position["finished"]
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The positions of all ranks, and what their meaning depends on; called on every rank."""
        if self._loader is None:
            return {}
        positions: list[Any] = [self._loader.position]
        if self._loader.world > 1:
            positions = [None] * self._loader.world
            dist.all_gather_object(positions, self._loader.position)
        return {"order": self.order, "positions": positions}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from saved positions.

        Raises:
            ConfigError: the order of the documents would be another; names the keys.
        """
        changed = [
            f"data.{key} was {state_dict['order'].get(key)} and is now {value}"
            for key, value in self.order.items()
            if state_dict["order"].get(key) != value
        ]
        world, now = len(state_dict["positions"]), self._ranks()["world"]
        changed += [f"{world} ranks were training and now {now}"] * (world != now)
        if changed:
            raise ConfigError(
                f"data: the checkpoint's place in the corpus has no meaning now: {'; '.join(changed)}. Set "
                f"them back, or start anew without the checkpoint."
            )
        self._resume = state_dict["positions"]

    def _ranks(self) -> dict[str, Any]:
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        agree = across_ranks() if world > 1 and dist.is_initialized() else alone
        return {"rank": rank, "world": world, "workers": self.num_workers, "agree": agree}


def _sources(sources: Sources | None, key: str) -> list[Source]:
    listed = [] if sources is None else [sources] if isinstance(sources, str) else sources
    found = [Source(source) if isinstance(source, str) else source for source in listed]
    check_weights(found, key)
    return found


def _check(
    held_out: float, validation: Sources | None, num_workers: int, batch_size: int, max_length: int
) -> None:
    faults = []
    if not 0 <= held_out < 1:
        faults.append(f"data.held_out is {held_out}; a share of the documents lies in [0, 1)")
    if held_out and validation:
        faults.append("data.held_out and data.validation are both set; keep one")
    if num_workers not in (0, *(n for n in range(1, LANES + 1) if LANES % n == 0)):
        faults.append(f"data.num_workers is {num_workers}; 0 or a divisor of {LANES} is accepted")
    if batch_size < 1 or max_length < 2:
        faults.append(f"data.batch_size is {batch_size} and max_length {max_length}; at least 1 and 2")
    if faults:
        raise ConfigError(". ".join(faults) + ".")


def _count(tokens: int | str | None) -> int | None:
    """A number of tokens; K, M, B and T after it stand for 1e3, 1e6, 1e9 and 1e12."""
    if tokens is None or isinstance(tokens, int):
        return tokens
    digits, factor = tokens.strip(), 1.0
    if digits[-1:].upper() in (powers := {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}):
        digits, factor = digits[:-1], powers[digits[-1].upper()]
    try:
        return int(float(digits) * factor)
    except ValueError:
        raise ConfigError(f"data.max_tokens is '{tokens}'; give a number such as 2000000 or 500M.") from None
