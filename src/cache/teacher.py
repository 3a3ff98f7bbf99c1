"""The LightningModule with which ``predict`` writes a cache: a forward pass of the teacher."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import torch
from lightning import Callback, Trainer
from torch import Tensor

from src.cache.shards import Precision, Rows, rows_of
from src.cache.writer import CacheWriter
from src.data.batches import supervised
from src.errors import ConfigError
from src.losses.signals import TopK, live_signal
from src.models.gated import freeze
from src.models.head import OutputHead
from src.models.sharding import shard
from src.ranges import Count, NonNegative, checked
from src.training.ranks import least
from src.training.stage import Stage
from src.training.strategies import check_device, check_quantised, kind


class CacheTeacher(Stage):
    """Computes the teacher's k likeliest tokens at every supervised position, for a :class:`CacheWriter`.

    Args:
        model: Hub id or directory of the teacher.
        out: directory of the cache; the same command again resumes it.
        k: tokens kept at each position.
        precision: how log-probabilities are stored: ``float32``, ``float16``, or ``compact`` (one byte).
        chunk_tokens: positions that pass through the output head at a time; fewer take less memory.
        shard_positions: supervised positions after which a file is closed; a kill costs at most these.
        count_seconds: seconds spent on counting the corpus before the run, to forecast time and size.
        kwargs: how the teacher is loaded; see :class:`src.training.stage.Stage`.

    Raises:
        ConfigError: ``precision`` is unknown, or ``out`` is a URL.
    """

    @checked
    def __init__(
        self,
        model: str,
        out: str,
        k: Count = 10,
        precision: Precision = "float16",
        chunk_tokens: Count = 256,
        shard_positions: Count = 1 << 18,
        count_seconds: NonNegative = 10.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, checkpoint_activations=False, **kwargs)
        wrong = list[str]()
        if precision not in get_args(Precision):
            wrong.append(f"model.precision: '{precision}' is none of {', '.join(get_args(Precision))}.")
        if "://" in out:
            wrong.append(
                f"model.out: '{out}' is a URL. Write to a directory, and copy it there when it is done."
            )
        if wrong:
            raise ConfigError(" ".join(wrong))
        self.writer = CacheWriter(out, precision, shard_positions, count_seconds)
        self.skip: int = 0
        """Number of first batches whose signal this rank has written already."""
        self.idle: int = 0
        """Number of first batches that the model skips: a sharded model must run while any rank needs it."""
        self.k, self.chunk_tokens = k, chunk_tokens

    def refuse(self, trainer: Trainer, data: object) -> None:
        if kind(trainer.strategy) == "deepspeed":
            raise ConfigError(
                "trainer.strategy: DeepSpeed shards the state of training, and a teacher only runs forward. "
                "Use configs/strategy/fsdp2.yaml for a teacher too large for a device, or "
                "configs/strategy/ddp.yaml."
            )
        check_quantised(trainer, self.loading.quantize)
        check_device(trainer)

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        self.model = freeze(self.load())
        self.head = OutputHead(self.model)
        if self.engine:
            self.check()
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh["data_parallel"])

    def configure_callbacks(self) -> list[Callback]:
        """Return the writer, which Lightning adds to the trainer's callbacks."""
        return [self.writer]

    def on_predict_start(self) -> None:
        if not self.engine:
            self.check()

    def resume(self, batches: int) -> None:
        """Have :meth:`predict_step` compute no signal for the first batches, which lie in the cache.

        A collective call if the model is sharded: every rank must make it.

        Args:
            batches: number of these batches on this rank.
        """
        sharded = kind(self.trainer.strategy) in ("fsdp", "fsdp2")
        self.skip, self.idle = batches, least(batches, self.device) if sharded else batches

    @torch.no_grad()
    def signal(self, batch: dict[str, Tensor]) -> TopK:
        """Return the teacher's k likeliest tokens at the N supervised positions of a batch, in order."""
        index_N = supervised(batch["labels"], batch.get("position_ids"))
        hidden_NH = self.head.at(batch, index_N)
        signal = live_signal(self.head, hidden_NH, self.k, self.chunk_tokens)
        assert isinstance(signal, TopK)
        return signal

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Rows:
        """Return the documents of a batch with their signal; without one for the first ``skip`` batches.

        Raises:
            ConfigError: the model's distribution has NaN or infinity.
        """
        if batch_idx < self.idle:
            return rows_of(batch, None)
        signal = self.signal(batch)
        rows = rows_of(batch, signal if batch_idx >= self.skip else None)
        if not np.isfinite(rows.entropy).all():
            bad = (~np.isfinite(rows.entropy)).sum()
            raise ConfigError(
                f"model: '{self.name}' says NaN or infinity at {bad} of {len(rows.entropy)} positions of "
                f"batch {batch_idx}; nothing of it was written. Numbers may be too large for their type: set "
                f"model.dtype to bfloat16 or float32, and trainer.precision likewise."
            )
        return rows
