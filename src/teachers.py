"""Sources of a teacher's signal: a model that runs beside the student, or a cache.

Both give the same signal for the same tokens, so a loss cannot tell them apart.

Shapes: B batch, T tokens of a row, N supervised positions, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Protocol

import torch
from lightning import Trainer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from src.cache.corpus import CachedCorpus
from src.cache.origin import check_origin
from src.data.batches import Batch
from src.errors import ConfigError
from src.losses.distill import TAIL, Distillation
from src.losses.signals import Signal, TopK, live_signal
from src.models.fingerprint import weights_fingerprint
from src.models.gated import freeze
from src.models.head import OutputHead
from src.models.loading import Dtype, Loading, Quantization
from src.models.sharding import shard
from src.models.streams import streams
from src.models.vocabulary import check_vocabulary
from src.training.data import Data
from src.training.strategies import UNSHARDABLE, kind


class Learner(Protocol):
    """What a teacher asks of the stage that learns from it."""

    @property
    def name(self) -> str:
        """Hub id or directory of the student's parent."""

    @property
    def revision(self) -> str | None:
        """Hub revision of that parent."""

    @property
    def weights(self) -> str | None:
        """Fingerprint of the parent's weights."""

    @property
    def distillation(self) -> Distillation:
        """The divergence from the signal, which says how many tokens the signal must hold."""

    @property
    def head(self) -> OutputHead:
        """Output head of the student."""

    @property
    def data(self) -> Data:
        """The data module, which has a tokenizer."""

    @property
    def device(self) -> torch.device:
        """Device of the student."""

    @property
    def device_mesh(self) -> DeviceMesh | None:
        """Mesh of the ranks under FSDP2, else None."""


class TeacherSource(Protocol):
    """What a stage asks of its teacher."""

    @property
    def weights(self) -> str | None:
        """Fingerprint of a model of its own; None if it is the parent, or a cache."""

    def refuse(self, trainer: Trainer, data: object, distillation: Distillation) -> None:
        """Refuse a trainer, data or a loss that this source cannot work with, before anything is loaded.

        Raises:
            ConfigError: it cannot work with them; names the key to change.
        """

    def adopt(self, parent: PreTrainedModel) -> None:
        """Take the loaded parent of the student; a source that needs no model ignores it."""

    def setup(self, learner: Learner) -> None:
        """Get ready to give signals to a learner, whose student is on its device by now."""

    def signal(self, batch: Batch, index_N: Tensor) -> Signal:
        """Return the signal at flat positions ``index_N`` (into ``B * T``) of a batch."""

    def states(self, layers: Sequence[int]) -> AbstractContextManager[dict[int, Tensor]]:
        """Collect the parent's stream ``[B, T, H]`` behind ``layers`` while :meth:`signal` runs in the block.

        It yields a dict by layer, filled by that run. A recovery also calls it before anything is loaded, so
        that a source without states is refused in time.

        Raises:
            ConfigError: ``layers`` is not empty, and this source has none of the parent's.
        """


class LiveTeacher:
    """Runs a frozen model on every batch.

    A tuple holds the model, so that no state dict, optimiser or sharding engine ever sees it.

    Args:
        model: Hub id or directory; None is the model being shortened.
        quantize: hold the weights in ``int8`` or ``nf4``. If this, ``dtype`` or ``attention`` is given, the
            teacher loads a copy of its own, also of the model being shortened.
        dtype: type of the weights that are not quantised; None is the parent's, of another model float32.
        revision: Hub revision of another model.
        attention: attention implementation; None is the parent's, of another model transformers' choice.
        shard: under FSDP2, spread the weights over the ranks as the student's are; false keeps a whole copy
            on each, which is faster; None shards what is not quantised.
    """

    def __init__(
        self,
        model: str | None = None,
        quantize: Quantization | None = None,
        dtype: Dtype | None = None,
        revision: str | None = None,
        attention: str | None = None,
        shard: bool | None = None,
    ) -> None:
        self.name, self.shard = model, shard
        self.k: int | None = None
        self.loading = Loading(revision, dtype or "float32", quantize, attention)
        self.adopts = all(own is None for own in (model, quantize, dtype, attention))
        self._model: tuple[PreTrainedModel, ...] = ()

    @cached_property
    def weights(self) -> str | None:
        """Fingerprint of a model other than the parent, else None."""
        return weights_fingerprint(self.name, self.loading.revision) if self.name else None

    def refuse(self, trainer: Trainer, data: object, distillation: Distillation) -> None:
        """Refuse ``shard`` where it cannot be followed.

        Raises:
            ConfigError: the strategy is not FSDP2, or the weights are quantised; names the alternatives.
        """
        strategy = kind(trainer.strategy)
        if self.shard and strategy != "fsdp2":
            raise ConfigError(
                f"teacher.shard: only FSDP2 shards a teacher, and this is '{strategy}'. Use "
                f"configs/strategy/fsdp2.yaml, teacher.quantize, or a cache (src.teachers.CachedTeacher)."
            )
        if self.shard and self.loading.quantize:
            raise ConfigError(
                f"teacher.shard: {UNSHARDABLE}. Set it to false (one quantised copy on each rank), or "
                f"teacher.quantize to null."
            )

    def adopt(self, parent: PreTrainedModel) -> None:
        """Take the parent, unless another model or a copy in another form is configured."""
        if self.adopts:
            self._model = (parent,)

    def setup(self, learner: Learner) -> None:
        """Load the model unless it is the adopted parent, move it to the device, and check its output head.

        Raises:
            ConfigError: the model cannot be loaded, or its vocabulary does not fit the data's tokenizer.
        """
        self.k = learner.distillation.asks
        if not self._model:
            revision = self.loading.revision if self.name else learner.revision
            self._model = (replace(self.loading, revision=revision).load(self.name or learner.name),)
        (model,) = self._model
        freeze(model)
        if self.name is not None:
            tokens = learner.data.tokenizer
            check_vocabulary(tokens, model, self.name, self.loading.revision, "teacher.model")
        plain = self.loading.quantize is None
        if learner.device_mesh is not None and (plain if self.shard is None else self.shard):
            shard(model, learner.device_mesh["data_parallel"])
        elif plain:
            nn.Module.to(model, learner.device)
        self.head = OutputHead(model)
        self.vocabulary = learner.head.vocabulary
        self.head.check()

    @torch.no_grad()
    def signal(self, batch: Batch, index_N: Tensor) -> Signal:
        """Run the model on a batch; return its signal at the flat positions ``index_N`` (into ``B * T``)."""
        hidden_NH = self.head.at(batch, index_N)
        return live_signal(self.head, hidden_NH, self.k, vocabulary=self.vocabulary)

    def states(self, layers: Sequence[int]) -> AbstractContextManager[dict[int, Tensor]]:
        """Collect the stream behind ``layers`` of the model, which must be the parent, quantised or not.

        Raises:
            ConfigError: it is another model.
        """
        if layers and self.name is not None:
            raise ConfigError(
                f"teacher.model: a term compares layers with the parent's, and '{self.name}' may be another "
                f"model. Leave teacher.model out, or the term (src.losses.HiddenStates)."
            )
        return streams(self.head.model, layers) if self._model else nullcontext({})


class CachedTeacher:
    """Takes the signal that lies beside the tokens in a batch of ``src.cache.CachedCorpus``; no model runs.

    Args:
        any_teacher: accept the signal of a model other than the parent, such as a larger one with the same
            tokenizer.
    """

    k: int | None = None
    weights: str | None = None

    def __init__(self, any_teacher: bool = False) -> None:
        self.any_teacher = any_teacher

    def refuse(self, trainer: Trainer, data: object, distillation: Distillation) -> None:
        """Refuse data that are no cache, and a loss that reads more than a cache holds.

        Raises:
            ConfigError: the data are no cache, or the loss reads the distribution within the tail.
        """
        if distillation.tail:
            raise ConfigError(TAIL)
        self.corpus(data)

    def adopt(self, parent: PreTrainedModel) -> None:
        """Let the parent go: a cache needs none, and its memory is freed."""

    def setup(self, learner: Learner) -> None:
        """Check that the cache fits the student's vocabulary and parent, and stores what the loss needs.

        Raises:
            ConfigError: the data are not a cache, the cache is of another teacher, or it does not fit the
                loss.
        """
        corpus, distillation = self.corpus(learner.data), learner.distillation
        self.k = distillation.k
        tempered = distillation.temperature != 1 and distillation.rule == "bucket"
        self.vocabulary = learner.head.vocabulary
        corpus.fits(self.vocabulary, self.k, tempered)
        for cache in [] if self.any_teacher else corpus.caches:
            check_origin(cache, learner.weights, learner.name, learner.revision)

    @staticmethod
    def corpus(data: object) -> CachedCorpus:
        """Return the cache that the batches come from.

        Raises:
            ConfigError: the data are no cache.
        """
        if not isinstance(data, CachedCorpus):
            raise ConfigError(
                f"teacher: CachedTeacher needs 'data: {{class_path: src.cache.CachedCorpus}}', found "
                f"{type(data).__name__}. Name a cache there, or use src.teachers.LiveTeacher."
            )
        return data

    def signal(self, batch: Batch, index_N: Tensor) -> Signal:
        """Return the cached signal at the N supervised positions, in the order of ``index_N``."""
        signal = TopK(*(batch[f"teacher_{key}"] for key in ("ids", "log_probs", "entropy", "log_rest")))
        assert len(signal.ids) == len(index_N), "one signal of the cache for each supervised position"
        signal = signal.within(self.vocabulary)
        return signal if self.k is None or self.k >= signal.ids.shape[-1] else signal.truncate(self.k)

    def states(self, layers: Sequence[int]) -> AbstractContextManager[dict[int, Tensor]]:
        """Collect nothing: a cache holds the parent's signal, not its inner layers.

        Raises:
            ConfigError: ``layers`` is not empty.
        """
        if layers:
            raise ConfigError(
                "teacher: a term compares layers with the parent's, which a cache does not hold. Use "
                "src.teachers.LiveTeacher (with its quantize, if memory is short), or leave the term out "
                "(src.losses.HiddenStates)."
            )
        return nullcontext({})
