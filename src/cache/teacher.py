"""The teacher's forward pass, as the module that ``predict`` runs."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from src.cache.fingerprint import weights_fingerprint
from src.cache.shards import Precision, Rows, rows_of
from src.cache.writer import CacheWriter
from src.errors import ConfigError
from src.losses.distill import supervised
from src.losses.signals import TopK, live_signal
from src.models.gated import freeze
from src.models.head import OutputHead
from src.models.loading import Dtype, Quantization, load_model
from src.models.sharding import shard
from src.training.ranks import least
from src.training.refusals import check_cache
from src.training.strategies import kind


class CacheTeacher(LightningModule):
    """Says, for every supervised position, the k likeliest tokens; a :class:`CacheWriter` keeps it.

    Args:
        model: Hub id or directory of the teacher.
        out: directory of the cache; the same command again resumes it.
        k: tokens kept.
        precision: of the stored log-probabilities: ``float32``, ``float16``, or ``compact`` (one byte).
        revision: Hub revision.
        dtype: type of the weights that are not quantised.
        quantize: load the model in ``int8`` or ``nf4``.
        attention: attention implementation; None lets transformers choose.
        chunk_tokens: positions projected to the vocabulary at a time.
        shard_positions: supervised positions after which a file is closed; a kill costs at most these.
        count_seconds: time for counting the corpus before it starts, so that its cost can be told.
    """

    def __init__(
        self,
        model: str,
        out: str,
        k: int = 10,
        precision: Precision = "float16",
        revision: str | None = None,
        dtype: Dtype = "float32",
        quantize: Quantization | None = None,
        attention: str | None = None,
        chunk_tokens: int = 256,
        shard_positions: int = 1 << 18,
        count_seconds: float = 10.0,
    ) -> None:
        super().__init__()
        counts = {"k": k, "chunk_tokens": chunk_tokens, "shard_positions": shard_positions}
        wrong = [f"model.{key}: {got!r} given; accepted: at least 1." for key, got in counts.items()
                 if not isinstance(got, int) or got < 1]  # fmt: skip
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
        """Batches that need no signal: this rank has it already."""
        self.idle: int = 0
        """Batches that the model need not run on: a sharded one runs while any rank needs it."""
        self.name, self.k, self.chunk_tokens = model, k, chunk_tokens
        self.loading: dict[str, Any] = {
            "revision": revision, "dtype": dtype, "quantize": quantize, "attention": attention,
        }  # fmt: skip

    def refuse(self, trainer: Trainer, data: object) -> None:
        """Refuse, before anything is loaded, what cannot work with this trainer."""
        check_cache(trainer, self.loading["quantize"])

    def setup(self, stage: str) -> None:
        self.refuse(self.trainer, None)

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        self.model = load_model(self.name, **self.loading)
        freeze(self.model)
        self.fingerprint = weights_fingerprint(self.model)
        self.head = OutputHead(self.model)
        if self._engine:
            self.head.check()
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh["data_parallel"])

    @property
    def _engine(self) -> bool:
        """Whether an engine takes the weights away after ``configure_model``."""
        return self._trainer is not None and kind(self.trainer.strategy) == "fsdp"

    def configure_callbacks(self) -> list[Callback]:
        """Lightning adds the writer to the trainer's callbacks."""
        return [self.writer]

    def on_predict_start(self) -> None:
        if not self._engine:
            self.head.check()

    def resume(self, batches: int) -> None:
        """Skip the first ``batches``, which lie in the cache; called on every rank."""
        sharded = kind(self.trainer.strategy) in ("fsdp", "fsdp2")
        self.skip, self.idle = batches, least(batches, self.device) if sharded else batches

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Rows:
        """The documents of a batch with their signal; without one for the first ``skip`` batches.

        Raises:
            ConfigError: the model says something that is not finite.
        """
        if batch_idx < self.idle:
            return rows_of(batch, None)
        index = supervised(batch["labels"], batch.get("position_ids"))
        with torch.no_grad():
            hidden_NH = self.head.hidden(batch).flatten(0, 1)[index]
            signal = live_signal(self.head, hidden_NH, self.k, self.chunk_tokens)
        assert isinstance(signal, TopK)
        rows = rows_of(batch, signal if batch_idx >= self.skip else None)
        if not np.isfinite(rows.entropy).all():
            bad = (~np.isfinite(rows.entropy)).sum()
            raise ConfigError(
                f"model: '{self.name}' says NaN or infinity at {bad} of {len(rows.entropy)} positions of "
                f"batch {batch_idx}; nothing of it was written. Numbers may be too large for their type: set "
                f"model.dtype to bfloat16 or float32, and trainer.precision likewise."
            )
        return rows
