"""Whether a cache holds the signal of the model that a recovery cuts.

A base model and its fine-tuned child share tokenizer and vocabulary, so nothing else tells them apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedModel

from src.cache.fingerprint import weights_fingerprint
from src.cache.reader import Cache
from src.errors import ConfigError

_OTHER = "model.init_args.teacher.init_args.any_teacher to true"


@dataclass(frozen=True)
class Origin:
    """What is kept of a model that is not: enough to tell whether a cache is of it.

    Attributes:
        weights: fingerprint of its weights.
        dtype: their type, as in a config.
        commit: revision of the Hub that was loaded, or None.
    """

    weights: str
    dtype: str
    commit: str | None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Origin:
        """Read a model that is not quantised; of each tensor 64 values, so its size does not matter."""
        dtype = str(model.dtype).removeprefix("torch.")
        return cls(weights_fingerprint(model), dtype, getattr(model.config, "_commit_hash", None))

    def check(self, cache: Cache, name: str, revision: str | None) -> None:
        """Compare with the teacher of ``cache``: the weights, or the names where those have other types.

        Args:
            cache: whose teacher is asked.
            name: id of this model.
            revision: revision that was asked for, or None.

        Raises:
            ConfigError: the weights are others.
        """
        about = cache.about
        if about.weights == self.weights:
            return
        theirs = f"'{about.teacher}'" + (f" (revision {about.revision})" if about.revision else "")
        ours = f"'{name}'" + (f" (revision {revision or self.commit})" if revision or self.commit else "")
        if about.quantize is None and about.dtype == self.dtype:
            raise ConfigError(
                f"cache: teacher: '{cache.path}' was written by {theirs}, weights {about.weights}; the model "
                f"that is recovered is {ours}, weights {self.weights}. Write a cache with "
                f"--model.init_args.model {name}, or set {_OTHER}."
            )
        same = Path(about.teacher).absolute() == Path(name).absolute()
        if not same or about.revision not in ({revision, self.commit} - {None} or {None}):
            form = about.quantize or about.dtype or "a type that was not noted"
            rank_zero_warn(
                f"cache: teacher: '{cache.path}' was written by {theirs}; the model that is recovered is "
                f"{ours}. Their weights cannot be compared ({form}, and {self.dtype}). If it is meant, set "
                f"{_OTHER}."
            )
