"""The base of search, recovery and cache: it loads one model, and checks early that it can be used."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from transformers import PreTrainedModel

from src.data.batches import Batch
from src.data.distinct import Distinct
from src.models.fingerprint import weights_fingerprint
from src.models.head import OutputHead
from src.models.loading import Dtype, Loading, Quantization
from src.models.vocabulary import check_vocabulary
from src.training import identity
from src.training.data import Data, data_of
from src.training.finite import FiniteOnly
from src.training.progress import waiting
from src.training.ranks import from_all
from src.training.strategies import kind


class Stage(LightningModule, ABC):
    """A LightningModule that runs one model; a subclass loads it in ``configure_model`` and sets ``head``.

    Args:
        model: Hub id or directory of the model.
        revision: its Hub revision.
        dtype: type of the loaded weights. To train in mixed precision, keep float32 and set
            ``trainer.precision``.
        quantize: hold the weights in ``int8`` or ``nf4``.
        attention: attention implementation; None lets transformers choose.
        checkpoint_activations: recompute layers in the backward pass, to save memory.
    """

    head: OutputHead
    parent_key = identity.MODEL
    """Key that names the model."""

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        dtype: Dtype = "float32",
        quantize: Quantization | None = None,
        attention: str | None = None,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.loading = model, Loading(revision, dtype, quantize, attention)
        self.checkpoint_activations = checkpoint_activations
        self.tokens = 0
        self.read = Distinct()
        """Documents that this rank has been repaired on, learned from or been judged by, however often."""
        self.weights: str | None = None
        """Fingerprint of the model's weights, once they are loaded."""
        self.figures: dict[str, Any] = {}
        """What the stage found, for its record."""
        self.settings: dict[str, Any] = {}
        """The experiment as the command line gives it, which checkpoints note."""
        self.accepted: Sequence[str] = ()
        """Keys that the user allows to change on resume."""

    @property
    def revision(self) -> str | None:
        """The Hub revision that the config asks for."""
        return self.loading.revision

    @waiting("the model is loaded")
    def load(self, dtype: Dtype | None = None) -> PreTrainedModel:
        """Load and return the model, in ``dtype`` if given; note its weights' fingerprint in ``weights``."""
        model = replace(self.loading, dtype=dtype or self.loading.dtype).load(self.name)
        self.weights = weights_fingerprint(self.name, self.revision)
        return model

    @abstractmethod
    def refuse(self, trainer: Trainer, data: object) -> None:
        """Refuse a trainer or data with which this stage cannot work, before anything is loaded.

        Raises:
            ConfigError: the stage cannot work with them; names the key and the alternative.
        """

    def configure_callbacks(self) -> list[Callback]:
        return [FiniteOnly()]

    def setup(self, stage: str) -> None:
        """Call :meth:`refuse`, as the command line does earlier, for a Trainer that is used without it."""
        self.refuse(self.trainer, data_of(self.trainer))

    @property
    def data(self) -> Data:
        """The data module of the run."""
        return cast(Data, data_of(self.trainer))

    @property
    def engine(self) -> bool:
        """Whether FSDP1 or DeepSpeed shards the weights after ``configure_model``, by itself."""
        return self._trainer is not None and kind(self.trainer.strategy) in ("fsdp", "deepspeed")

    def check(self) -> None:
        """Check that the loss can compute the model's logits, and that data and model share a vocabulary.

        Raises:
            ConfigError: the head computes something unknown, or the data's tokenizer is not the model's.
        """
        self.head.check()
        check_vocabulary(self.data.tokenizer, self.head.model, self.name, self.revision)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self.read.add(batch)

    @property
    def teacher_weights(self) -> str | None:
        """Fingerprint of the teacher's weights."""
        return self.weights

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record in the checkpoint the identity of the run, and which documents all ranks have read."""
        checkpoint["identity"] = identity.note(self)
        checkpoint["read"] = self.read.unite(from_all(self.read.sample)).sample

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is of this run, and take over which documents were read.

        Raises:
            ConfigError: the checkpoint is of another run; names what differs, by key.
        """
        resumes = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        identity.check(checkpoint.get("identity"), self, resumes)
        if "read" in checkpoint:  # checkpoints of an earlier form do not say
            self.read.unite([checkpoint["read"]])

    def on_validation_start(self) -> None:
        """Prepare the model as a fit does, if only validation runs."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            self.on_fit_start()

    def on_test_start(self) -> None:
        """Prepare the model as a fit does, because only the test runs."""
        self.on_fit_start()
