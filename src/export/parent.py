"""Check that a parent, a mask and a checkpoint belong together, and choose the parent's name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from src.errors import ConfigError
from src.mask import Mask
from src.models.fingerprint import differ, weights_fingerprint


def true_parent(mask: Mask, name: str, record: dict[str, Any] | None, any_parent: bool) -> Mask:
    """Return the mask with the name of the parent that is really cut, for the card and ``mask.json``.

    If the loaded parent has the weights that the mask was made for, the name in the mask stays; else the
    loaded parent's takes its place.

    Args:
        mask: names the parent it was made for, if possible with a fingerprint.
        name: Hub id or directory of the loaded parent.
        record: the checkpoint of a recovery, without weights; None if there is no checkpoint.
        any_parent: whether the user allows a parent that the mask was not made for.

    Raises:
        ConfigError: the checkpoint was trained under another parent, or the mask was made for another one
            that the user does not allow.
    """
    run = record.get("identity") if record is not None else None
    if record is not None and run is None:
        rank_zero_warn("--checkpoint: it notes no parent; that it was trained under this one is not checked.")
    revision = mask.revision if name == mask.model else None
    weights = weights_fingerprint(name, revision)
    if run is not None and differ(run["weights"], weights):
        raise ConfigError(
            f"--checkpoint: it was trained under '{run['parent']}' ({run['weights']}), and '{name}' is "
            f"another model ({weights}). Give its parent: --model {run['parent']}, or where that lies now."
        )
    other = differ(mask.fingerprint, weights)
    trained = run is not None and differ(run["weights"], weights) is False
    if other and not (trained or any_parent):
        raise ConfigError(
            f"--mask: it was made for '{mask.model}' ({mask.fingerprint}), and '{name}' is another model "
            f"({weights}). Give the model it was made for, or --any-parent if it is meant for this one too."
        )
    if other is None and (name != mask.model or mask.fingerprint is not None):
        rank_zero_warn(f"--mask: whether '{name}' is '{mask.model}', for which it was made, cannot be told.")
    same = other is False or (name == mask.model and not other)
    return mask if same else replace(mask, model=name, revision=revision, fingerprint=weights)
