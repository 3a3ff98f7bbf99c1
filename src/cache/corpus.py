"""A data module that reads a cache, so that tokens and the teacher's signal come from the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn

from src.cache.loader import CachedLoader
from src.cache.reader import Cache
from src.errors import ConfigError
from src.models.fingerprint import tokenizer_fingerprint
from src.models.loading import load_tokenizer
from src.ranges import Count, Seed, checked
from src.training.identity import changes, refuse_changes


class CachedCorpus(LightningDataModule):
    """Gives the rows of a cache to a recovery whose ``teacher`` is ``src.teachers.CachedTeacher``.

    Args:
        tokenizer: Hub id or directory of the student's tokenizer; it must be the one of the cache.
        train: directory or URL of the cache to train on.
        validation: another cache, to validate on.
        corpus: fingerprint that the corpus of ``train`` must have, to pin an experiment to its data.
        batch_size: documents of a batch.
        seed: seed of the order.

    Raises:
        ConfigError: a cache cannot be read or was written with another tokenizer, or ``corpus`` differs.
    """

    accepted: Sequence[str] = ()
    """Keys that a resumed run may change without being refused (``--accept``)."""

    @checked
    def __init__(
        self,
        tokenizer: str | None = None,
        train: str | None = None,
        validation: str | None = None,
        corpus: str | None = None,
        batch_size: Count = 32,
        seed: Seed = 0,
    ) -> None:
        super().__init__()
        if train is None:
            raise ConfigError("data.train: give the directory of a cache.")
        if tokenizer is None:
            raise ConfigError("data.tokenizer: give the Hub id or directory of the model's tokenizer.")
        self.tokenizer = load_tokenizer(tokenizer)
        self.batch_size, self.seed = batch_size, seed
        self.train_cache = Cache(train)
        self.val_cache = Cache(validation) if validation else None
        own = tokenizer_fingerprint(self.tokenizer)
        for cache in self.caches:
            if own != cache.about.tokenizer:
                raise ConfigError(
                    f"data: tokenizer: '{tokenizer}' has fingerprint {own}, but '{cache.path}' was written "
                    f"with {cache.about.tokenizer}. Use the tokenizer of '{cache.about.teacher}'."
                )
        if corpus is not None and corpus != self.train_cache.corpus:
            raise ConfigError(f"data: corpus: {corpus} is asked, '{train}' holds {self.train_cache.corpus}.")

    @property
    def caches(self) -> list[Cache]:
        """The cache to train on and, if one is named, the cache to validate on."""
        return [self.train_cache, *([self.val_cache] if self.val_cache else [])]

    def fits(self, vocabulary: int, k: int | None, tempered: bool = False) -> None:
        """Check that the caches store what a loss needs.

        Args:
            vocabulary: V, the student's logits at a position.
            k: tokens that the loss compares at each position; None is the whole vocabulary.
            tempered: whether the loss needs, at a temperature other than 1, the teacher's probability of all
                tokens outside the k together.

        Raises:
            ConfigError: a cache keeps fewer tokens, or is too coarse for ``tempered``; names the key to
                change.
        """
        for cache in self.caches:
            about = cache.about
            shared = min(vocabulary, about.vocabulary)  # they may be padded to other widths
            if min(k or shared, shared) > about.k:
                raise ConfigError(
                    f"cache: k: '{cache.path}' keeps {about.k} tokens, the distillation wants {k or 'all'}. "
                    f"Lower model.distillation.k, or write a cache with a larger k."
                )
            if tempered and about.precision == "compact" and about.k < shared:
                raise ConfigError(
                    f"cache: precision: '{cache.path}' is compact, too coarse for the mass outside the "
                    f"{about.k} tokens at another temperature than 1. Set model.distillation.rule to "
                    f"renormalise, which leaves it out, or write a cache in float16."
                )

    def train_dataloader(self) -> CachedLoader:
        """Return the training batches, shuffled; each iteration over the loader is one epoch."""
        return self._loader(self.train_cache, shuffle=True)

    def val_dataloader(self) -> CachedLoader | list[Any]:
        """Return the batches of the validation cache, in order; an empty list without one."""
        return self._loader(self.val_cache, shuffle=False) if self.val_cache else []

    def test_dataloader(self) -> CachedLoader | list[Any]:
        """Return the same as :meth:`val_dataloader`."""
        return self.val_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """Return what must be the same on resume: the teacher and the validation cache.

        The position is in the state of the loader.
        """
        validation = self.val_cache and {
            "corpus": self.val_cache.corpus,
            "teacher": self.val_cache.about.weights,
        }
        return {"train": {"teacher": self.train_cache.about.weights}, "validation": validation}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a resume with the signal of another teacher, or with another validation cache.

        Raises:
            ConfigError: one of these differs; names the keys.
        """
        if self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING:
            differences = changes(state_dict, self.state_dict(), "data.init_args")
            refuse_changes(differences, self.accepted, "another cache")

    def _loader(self, cache: Cache, shuffle: bool) -> CachedLoader:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        pad = self.tokenizer.pad_token_id or 0  # it is masked
        return CachedLoader(cache, self.batch_size, pad, self.seed, shuffle, rank, world)
