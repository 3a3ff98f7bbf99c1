"""Write the teacher's signal to disk, shard by shard; a run that is killed loses at most one shard.

A shard consists of whole batches of the corpus in its fixed order. It is written under a temporary name,
flushed, renamed, and then entered in the manifest. A file that the manifest does not name does not belong to
the cache. A resumed run reads the batches of finished shards again, but computes no signal for them: it
compares their tokens with the manifest's fingerprints.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, Protocol, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from src.cache.forecast import Runner, forecast
from src.cache.manifest import Manifest, Shard
from src.cache.shards import Precision, Rows, encode
from src.data.loader import REPEATED
from src.data.rendering import Rendering
from src.errors import ConfigError
from src.files import unwritten, whole
from src.models.fingerprint import differ, tokenizer_fingerprint
from src.models.head import OutputHead
from src.models.loading import Loading
from src.training.data import data_of
from src.training.lock import lock


class Teacher(Runner, Protocol):
    """What the writer asks of the module that runs the teacher."""

    name: str
    loading: Loading
    model: PreTrainedModel
    weights: str | None
    head: OutputHead
    k: int

    def resume(self, batches: int) -> None:
        """Have the run compute no signal for the first ``batches``. Every rank must call it."""


class Rendered(Protocol):
    """What the writer asks of the data module: what documents were rendered and tokenised with."""

    tokenizer: PreTrainedTokenizerBase
    rendering: Rendering
    named_day: date | None
    """The day that the user set as today for chat templates; None if the user set none."""


class CacheWriter(BasePredictionWriter):
    """Writes the cache of a :class:`CacheTeacher`; run it again to resume.

    Args:
        out: directory of the cache.
        precision: how log-probabilities are stored: ``float32``, ``float16`` or ``compact`` (one byte).
        shard_positions: supervised positions after which a shard is closed.
        count_seconds: seconds spent on counting the corpus before the run, to forecast time and size.
    """

    def __init__(
        self,
        out: str,
        precision: Precision = "float16",
        shard_positions: int = 1 << 18,
        count_seconds: float = 10.0,
    ) -> None:
        super().__init__(write_interval="batch")
        self.out, self.precision = out, precision
        self.shard_positions, self.count_seconds = shard_positions, count_seconds
        self._held = ExitStack()
        """The directory's lock and the writing thread."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """On a resume, let chat templates take for today the day that the cache noted when it was begun.

        A day that the user sets wins.
        """
        super().setup(trainer, pl_module, stage)
        corpus = cast(Rendered, data_of(trainer))
        parts = (Manifest.load(self.out, part) for part in range(trainer.world_size))
        day = next((part.day for part in parts if part is not None and part.day is not None), None)
        if day is not None and corpus.named_day is None:
            corpus.rendering.day = date.fromisoformat(day)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the shards that are written, have the teacher skip them, and print what the rest will cost.

        Raises:
            ConfigError: the directory holds another cache or a damaged one, is in use, or cannot be written.
        """
        trainer.predict_loop.return_predictions = False  # they are on disk; memory stays flat
        teacher = cast(Teacher, pl_module)  # Lightning hands over its own type
        wanted = describe(trainer, teacher, self.precision)
        self.manifest = Manifest.load(self.out, wanted.part) or wanted
        wanted = _as_noted(wanted, self.manifest)
        if self.manifest.identity != wanted.identity:
            changed = "; ".join(
                f"{key} was {was} and is now {wanted.identity[key]}"
                for key, was in self.manifest.identity.items()
                if was != wanted.identity[key]
            )
            raise ConfigError(f"cache: '{self.out}' holds another one: {changed}. Choose another directory.")
        self.manifest = replace(self.manifest, complete=False)
        with self._writing():
            self._path("").mkdir(parents=True, exist_ok=True)
        self._held.enter_context(lock(self._path(""), "model.out"))
        self._check_files()
        self._known = deque(self.manifest.shards)
        teacher.resume(sum(shard.batches for shard in self._known))
        self._rows: list[Rows] = []
        self._batches = 0
        self._pool = self._held.enter_context(ThreadPoolExecutor(1))
        self._written = list[Future[None]]()
        trainer.print(forecast(trainer, teacher, self.manifest, self.count_seconds))

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Rows,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Add the rows of a batch to the present shard, and write the shard when it is full.

        If an earlier run wrote that shard, its tokens are compared instead.

        Raises:
            ConfigError: these tokens differ, or the disk is full.
        """
        self._batches += 1
        if REPEATED not in batch:
            self._rows.append(prediction)
        if self._known:
            if self._batches == self._known[0].batches:
                self._verify(self._known.popleft())
        elif sum(len(rows.entropy) for rows in self._rows) >= self.shard_positions:
            self._close()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last shard, and mark this part of the cache as complete.

        Raises:
            ConfigError: the corpus ended before the shards that an earlier run wrote, or the disk is full.
        """
        if self._known:
            raise ConfigError(f"cache: corpus: it ends before {self._known[0].file} of '{self.out}' now.")
        if self._rows:
            self._close()
        self._wait()
        self.manifest = replace(self.manifest, complete=True)
        self.manifest.save(self.out)
        self._held.close()
        trainer.print(
            f"cache: '{self._path('')}' is complete: {self.manifest.positions:,} positions, "
            f"{self.manifest.bytes_per_position:.1f} bytes each; mean_entropy "
            f"{self.manifest.mean_entropy:.6g} nats; corpus {self.manifest.corpus[:16]}."
        )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Wait until the shard being written is whole, and free the directory; it stays marked incomplete."""
        self._held.close()

    # ------------------------------------------------------------------ shards

    def _take(self) -> tuple[Rows | None, int]:
        rows, batches = self._rows, self._batches
        self._rows, self._batches = [], 0
        return Rows.concatenate(rows) if rows else None, batches

    def _verify(self, shard: Shard) -> None:
        rows, _ = self._take()
        if rows is None or rows.corpus != shard.corpus:
            raise ConfigError(
                f"cache: corpus: the batches of {shard.file} in '{self.out}' are other tokens now, or in "
                f"another order. Set the data (and the chat template) back, or choose another directory."
            )

    def _close(self) -> None:
        """Hand the present shard to the writing thread, which is at most one shard behind."""
        rows, batches = self._take()
        self._wait()
        if rows is not None:
            self._written = [self._pool.submit(self._write, rows, batches)]

    def _wait(self) -> None:
        for future in self._written:
            future.result()

    def _write(self, rows: Rows, batches: int) -> None:
        file = f"{len(self.manifest.shards):05d}.parquet"
        data = encode(rows, self.precision)
        with self._writing(), whole(self._path(file)) as partial:
            partial.write_bytes(data)
        shard = Shard(
            file=file,
            batches=batches,
            rows=len(rows.lengths),
            tokens=len(rows.tokens),
            positions=len(rows.entropy),
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            corpus=rows.corpus,
            entropy=float(rows.entropy.sum(dtype="float64")),
        )
        self.manifest = self.manifest.with_shard(shard)
        self.manifest.save(self.out)

    def _check_files(self) -> None:
        """Refuse to build on shards that are gone or damaged."""
        for shard in self.manifest.shards:
            path = self._path(shard.file)
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != shard.sha256:
                raise ConfigError(
                    f"cache: '{path}' is missing or damaged. Delete '{self.out}' and start anew."
                )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise ConfigError(
                f"cache: {unwritten(self._path(''), e)} Make room or choose another directory (model.out). "
                f"Shards that are finished are kept: the same command resumes."
            ) from e

    def _path(self, file: str) -> Path:
        return Path(self.out) / f"part-{self.manifest.part}" / file


def describe(trainer: Trainer, teacher: Teacher, precision: Precision) -> Manifest:
    """Return the manifest of the part that this process will write, without shards yet."""
    corpus = cast(Rendered, data_of(trainer))
    return Manifest(
        teacher=teacher.name,
        revision=teacher.loading.revision or getattr(teacher.model.config, "_commit_hash", None),
        weights=teacher.weights,
        quantize=teacher.loading.quantize,
        tokenizer=tokenizer_fingerprint(corpus.tokenizer),
        vocabulary=teacher.head.vocabulary,
        k=min(teacher.k, teacher.head.vocabulary),
        precision=precision,
        parts=trainer.world_size,
        part=trainer.global_rank,
        dtype=teacher.loading.dtype,
        compute=str(trainer.precision),
        day=corpus.rendering.day.isoformat(),
    )


def _as_noted(wanted: Manifest, existing: Manifest) -> Manifest:
    """Return the wanted manifest, with the existing values where an older cache has none to compare."""
    compared = differ(existing.weights, wanted.weights) is not None
    return replace(
        wanted,
        compute=existing.compute and wanted.compute,
        day=existing.day and wanted.day,
        weights=wanted.weights if compared else existing.weights,
    )
