"""Text, prompt-answer and chat corpora, streamed, as a LightningDataModule.

A batch is a dict of ``[B, T]`` int64 tensors. Padded rows have ``input_ids``, ``attention_mask``
and ``labels``; packed rows have ``input_ids``, ``position_ids`` and ``labels`` (see
:mod:`src.data.batches`). ``labels`` equals ``input_ids`` where a token is supervised and -100
elsewhere; it is not shifted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Annotated, Any, Literal, cast

import torch.distributed as dist
from lightning import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from src.data import options
from src.data.batches import Batch
from src.data.boundaries import check_boundaries
from src.data.columns import WELL_KNOWN, Columns
from src.data.content import alike, described
from src.data.loader import Loader, across_ranks, alone
from src.data.options import Sources
from src.data.reader import Corpora, State
from src.data.redistribute import redistribute
from src.data.rendering import Rendering, parse_day
from src.data.statistics import Statistics
from src.data.stream import Recipe
from src.data.tokenized import Tokenized
from src.errors import ConfigError
from src.models.fingerprint import tokenizer_fingerprint
from src.ranges import Count, Range, Seed, checked
from src.training.identity import Change, changes, refuse_changes


class Corpus(Tokenized):
    """Streams a corpus in an order fixed by the seed; a resumed run goes on with the very next batch.

    Args:
        tokenizer: Hub id or directory of the tokenizer; on the command line it is by default the model's.
        train: what to train on: a Hub id, file, glob, URL, directory or saved dataset; or a list of
            them; or a list of sources with weights.
        validation: what to validate on, in the same forms.
        held_out: share of the documents of ``train`` set apart for validation, instead of
            ``validation``.
        columns: which columns of the rows are read; by default well-known names are looked for.
        separator: text between prompt and answer.
        max_tokens: tokens to train on, over all ranks and epochs, such as 500M; by default no
            limit.
        shuffle_buffer: documents shuffled together by each rank.
        num_workers: worker processes of each rank: 0 (read in this process), 1, 2 or 4; changes no
            batch.
        seed: seed of the order.
        today: date that chat templates take for today, such as 2026-01-31; by default the day the run began.
        kwargs: how documents become rows and batches; see :class:`src.data.tokenized.Tokenized`.
    """

    accepted: Sequence[str] = ()
    """Keys that a resumed run may change without being refused (``--accept``)."""

    @checked
    def __init__(
        self,
        tokenizer: str | None = None,
        train: Sources | None = None,
        validation: Sources | None = None,
        held_out: Annotated[float, Range(float, 0, 1, open="high")] = 0.0,
        columns: Columns = WELL_KNOWN,
        separator: str = "\n",
        max_tokens: int | str | None = None,
        shuffle_buffer: Count = 8192,
        num_workers: int = 0,
        seed: Seed = 0,
        today: str | None = None,
        **kwargs: Any,
    ) -> None:
        options.check(held_out, validation, num_workers)
        super().__init__(tokenizer, **kwargs)
        self.train = options.sources(train, "data.train")
        self.validation = options.sources(validation, "data.validation")
        self.held_out, self.columns, self.separator = held_out, columns, separator
        self.max_tokens = options.token_count(max_tokens)
        self.shuffle_buffer, self.num_workers, self.seed = shuffle_buffer, num_workers, seed
        self.named_day = parse_day(today)
        self.rendering = Rendering(self.tokenizer, self.named_day)
        self._order = {
            "columns": asdict(self.columns), "held_out": held_out, "separator": separator, **self.shape,
            "shuffle_buffer": shuffle_buffer, "seed": seed,
        }  # fmt: skip
        self.setup("")

    def setup(self, stage: str) -> None:
        """Prepare for a run: forget positions of an earlier one, and give all ranks the first rank's date."""
        if self.trainer is not None:
            self.rendering.day = self.trainer.strategy.broadcast(self.rendering.day)
        self._loader: Loader | None = None
        self._resume: list[State] | None = None
        self._warnings.clear()
        self._apart = False  # whether the model was seen to keep packed documents apart

    def loader(self, split: Literal["train", "validation"], shuffle: bool, **options: Any) -> Loader:
        """Return the loader of a split; ``options`` are those of :class:`src.data.loader.Loader`.

        Raises:
            ConfigError: the split has no source; or the model takes fewer tokens than ``max_length``, and
                ``too_long`` is ``error``.
        """
        apart = split == "validation" and self.held_out > 0
        sources = self.train if split == "train" or apart else self.validation
        if split == "validation":  # each document once: a weight would repeat those of small parts
            sources = [replace(source, weight=None) for source in sources]
        if not sources:
            raise ConfigError(f"data.{split} is not set; name a file, a Hub id or a list of sources.")
        corpora = Corpora(sources, self.columns, self.separator, self.rendering, self.held_out, apart)
        recipe = Recipe(corpora, self.fitted(), self.batching, self.shuffle_buffer, shuffle, self.seed)
        return Loader(recipe, **options)

    def train_dataloader(self) -> Loader:
        """Return the training batches, shuffled, from the position of a checkpoint on.

        Each iteration over the loader is one epoch.
        """
        keys = {**self._ranks(), "max_tokens": self.max_tokens}
        if self._loader is not None:  # asked for again during a fit
            keys["position"] = self._loader.position
        elif self._resume is not None:
            keys["position"] = self._resume[keys["rank"]]
        if self.trainer is not None:
            assert self.order, "what the run reads is noted as it begins"
        self._loader = self.loader("train", shuffle=True, **keys)
        if self.trainer is not None and self._loader.position["finished"]:
            self.trainer.should_stop = True
        return self._loader

    def val_dataloader(self) -> Loader | list[Any]:
        """Return the validation batches, each document once, in order; none without validation documents."""
        if not self.validation and not self.held_out:
            return []
        return self.loader("validation", shuffle=False, **self._ranks())

    def test_dataloader(self) -> Loader | list[Any]:
        """Return the same as :meth:`val_dataloader`. Answers to tasks are judged by the verb ``evaluate``."""
        return self.val_dataloader()

    def predict_dataloader(self) -> Loader:
        """Return the training batches of one epoch, in order, to write a cache from."""
        return self.loader("train", shuffle=False, mark=True, **self._ranks())

    @property
    def statistics(self) -> Statistics:
        """Counts of what this rank was trained on so far."""
        return self._loader.statistics if self._loader else Statistics()

    @property
    def tokens_seen(self) -> int:
        """Tokens that all ranks were trained on so far."""
        return self._loader.position["tokens"] if self._loader else 0

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Count a training batch as read: Lightning calls this when it hands the batch to the model.

        Raises:
            ConfigError: rows are packed and the model does not keep their documents apart.
        """
        trainer, loader = self.trainer, self._loader
        if trainer is not None and "position_ids" in batch and not self._apart:
            if (model := self.model()) is not None:
                check_boundaries(model)
            self._apart = True
        if trainer is None or not trainer.training or loader is None:
            return batch
        loader.handed()
        self._report(trainer, loader)
        trainer.should_stop |= loader.position["finished"]
        return batch

    def _report(self, trainer: Trainer, loader: Loader) -> None:
        """Log the counts as often as the trainer logs; warn of the first document that is not used whole."""
        counts, step = loader.statistics, trainer.global_step
        if step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]  # set, not declared
            numbers = {**counts.numbers(), "wait": loader.wait()}
            for logger in trainer.loggers:
                logger.log_metrics({f"data/{key}": n for key, n in numbers.items()}, step=step)
        for fate in counts.fates():
            self.warn_once(fate)

    @cached_property
    def order(self) -> dict[str, Any]:
        """Settings and fingerprints (tokenizer, corpora) that determine the documents and their order."""
        noted = {
            "tokenizer": tokenizer_fingerprint(self.tokenizer), "train": described(self.train),
            "validation": described(self.validation), **self._order,
        }  # fmt: skip
        return cast(dict[str, Any], json.loads(json.dumps(noted)))  # plain values, as a checkpoint holds

    def state_dict(self) -> dict[str, Any]:
        """Return the positions of all ranks, and the settings they depend on. Every rank must call it."""
        if self._loader is None:
            return {}
        positions: list[Any] = [self._loader.position]
        if self._loader.world > 1:
            positions = [None] * self._loader.world
            dist.all_gather_object(positions, self._loader.position)
        return {"order": self.order, "rendering": self.rendering.record, "positions": positions}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume a fit from saved positions, on any number of ranks; validation has no position.

        Raises:
            ConfigError: the order of the documents would be another; names the keys.
        """
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        refuse_changes(self._changes(state_dict["order"]), self.accepted, "other rows, or of another order")
        if "rendering" in state_dict:
            self.rendering.resume(state_dict["rendering"], self.named_day)
        self._resume = redistribute(state_dict["positions"], self._ranks()["world"])

    def _changes(self, was: dict[str, Any]) -> list[Change]:
        now = dict(self.order)
        if isinstance(was["tokenizer"], int):  # as checkpoints had it that knew no contents
            rank_zero_warn("data: the checkpoint does not say what its corpora held; it is not checked.")
            now["tokenizer"] = len(self.tokenizer)
        same = [key for key in ("train", "validation") if alike(was.get(key, now[key]), now[key])]
        return changes(was, {key: value for key, value in now.items() if key not in same}, "data.init_args")

    def _ranks(self) -> dict[str, Any]:
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        agree = across_ranks() if world > 1 and dist.is_initialized() else alone
        return {"rank": rank, "world": world, "workers": self.num_workers, "agree": agree}
