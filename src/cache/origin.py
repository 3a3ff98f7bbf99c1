"""Check that a cache holds the signal of the very model that a recovery cuts.

A base model and its fine-tuned child share tokenizer and vocabulary, so nothing but their weights tells them
apart.
"""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from src.cache.reader import Cache
from src.errors import ConfigError
from src.models.fingerprint import differ

_OTHER = "model.init_args.teacher.init_args.any_teacher to true"


def check_origin(cache: Cache, weights: str | None, name: str, revision: str | None) -> None:
    """Refuse a cache whose teacher has other weights than the model that is recovered.

    Where a fingerprint of weights is missing, names and revisions are compared; a difference gives a warning.

    Args:
        cache: the cache.
        weights: fingerprint of the model's weights; None if unknown.
        name: Hub id or directory of the model.
        revision: its Hub revision, or None.

    Raises:
        ConfigError: the weights differ.
    """
    about = cache.about
    other = differ(about.weights, weights)
    theirs = f"'{about.teacher}'" + (f" (revision {about.revision})" if about.revision else "")
    ours = f"'{name}'" + (f" (revision {revision})" if revision else "")
    if other:
        raise ConfigError(
            f"cache: teacher: '{cache.path}' was written by {theirs}, weights {about.weights}; the model "
            f"that is recovered is {ours}, weights {weights}. Write a cache with "
            f"--model.init_args.model {name}, or set {_OTHER}."
        )
    same = Path(about.teacher).absolute() == Path(name).absolute() and about.revision in (revision, None)
    if other is None and not same:
        rank_zero_warn(
            f"cache: teacher: '{cache.path}' was written by {theirs}; the model that is recovered is {ours}. "
            f"Whether their weights are the same cannot be told ({about.weights}, and {weights}). If it is "
            f"meant, set {_OTHER}."
        )
