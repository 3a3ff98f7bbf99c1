"""Check that a resumed run is the run that was saved.

A checkpoint records the identity of its run: the settings, and fingerprints of the parent's and the teacher's
weights. A resume compares them key by key. A change of what defines the run is refused, unless the user names
its key in ``--accept``. A change of a setting in :data:`FREE` is allowed, with a warning. Paths, logging and
devices do not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lightning.pytorch.utilities import rank_zero_warn

from src.errors import ConfigError
from src.mask import Mask
from src.models.fingerprint import differ

MODEL, MASK, _TEACHER = (f"model.init_args.{key}" for key in ("model", "mask", "teacher"))
RECOVERS = "recovers.json"
"""File in the directory of a recovery with the mask that it recovers, so that the directory can be moved."""
CONTENT = [
    MODEL,
    MASK,
    "model.init_args.revision",
    f"{_TEACHER}.init_args.model",
    f"{_TEACHER}.init_args.revision",
]
"""Keys that name a model or a mask, which are compared by content, not by name."""
FREE = [
    *(f"model.init_args.{key}" for key in ("optimizer", "warmup", "final_lr", "decay", "dtype", "quantize",
                                    "attention", "teacher", "checkpoint_activations")),
    *(f"trainer.{key}" for key in ("max_steps", "max_epochs", "max_time", "precision", "gradient_clip_val",
                                   "gradient_clip_algorithm", "limit_train_batches", "limit_val_batches")),
    "callbacks",
]  # fmt: skip
"""Settings that may change in the middle of a run; a change of one is reported."""
_DEFINING = ("trainer.accumulate_grad_batches",)
_SCHEDULES = ("src.callbacks.TemperatureAnnealing", "src.callbacks.PruningCurriculum")


@dataclass(frozen=True)
class Change:
    """A setting, or a fingerprint, that is not what the checkpoint recorded.

    Attributes:
        key: the setting's path in the config, with dots.
        was: its value in the checkpoint.
        now: its value in this run.
    """

    key: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} was {self.was} and is now {self.now}"

    def among(self, keys: Sequence[str]) -> bool:
        """Return whether one of ``keys`` is this key, or that of a section of the config that holds it."""
        return any(f"{self.key}.".startswith(f"{key}.") for key in keys)


class Accepting(Protocol):
    """What a resume asks of a data module: the changes that the user accepts."""

    accepted: Sequence[str]
    """Keys that the user allows to change on resume."""


class Resumable(Accepting, Protocol):
    """What a resume asks of a stage: names and fingerprints of its models, and its settings."""

    name: str
    parent_key: str
    weights: str | None
    settings: dict[str, Any]

    @property
    def teacher_weights(self) -> str | None:
        """Fingerprint of the teacher's weights."""


def changes(was: Any, now: Any, key: str = "") -> list[Change]:
    """Return the entries that differ between two nested dicts, with their keys.

    A key that only one of them has does not count, because the other may be older than that key.

    Args:
        was: the older dict.
        now: the newer one.
        key: path of both, which begins the keys of the changes.
    """
    if isinstance(was, dict) and isinstance(now, dict):
        common = [name for name in now if name in was]
        return [c for name in common for c in changes(was[name], now[name], f"{key}.{name}".strip("."))]
    return [] if was == now else [Change(key, was, now)]


def refuse_changes(differences: Sequence[Change], accepted: Sequence[str], kind: str) -> None:
    """Refuse changes between a checkpoint and a run, except those that the user accepts.

    An accepted change gives a warning.

    Args:
        differences: all changes of what defines the run.
        accepted: keys that the user allows to change (``--accept``).
        kind: what the checkpoint is of, for the message, such as "another run".

    Raises:
        ConfigError: a change is not accepted; names each such key with its old and its new value.
    """
    refused = [change for change in differences if not change.among(accepted)]
    if refused:
        raise ConfigError(
            f"ckpt_path: the checkpoint is of {kind}: {'; '.join(map(str, refused))}. Set them back, start "
            f"anew without the checkpoint, or go on all the same with "
            f"--accept {','.join(change.key for change in refused)}."
        )
    for change in differences:
        rank_zero_warn(f"ckpt_path: {change}; accepted, although the checkpoint is of {kind}.")


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of an experiment's config that a resume compares, as plain values."""
    trainer = config["trainer"]
    keys = [key.partition(".")[2] for key in (*FREE, *_DEFINING) if key.startswith("trainer.")]
    schedules = {c["class_path"]: c.get("init_args") for c in trainer.get("callbacks") or []
                 if c["class_path"] in _SCHEDULES}  # fmt: skip
    return {
        "seed_everything": config.get("seed_everything"),
        "model": config["model"],
        "data": {"class_path": config["data"]["class_path"]},
        "trainer": {key: trainer.get(key) for key in keys},
        "callbacks": schedules,
    }


def check_parent(mask: Mask, name: str, weights: str | None, key: str) -> None:
    """Compare the parent of a recovery with the one that its mask was made for.

    Another model, such as a fine-tuned child of it, is allowed with a warning if the user names it.

    Args:
        mask: the mask, which names the model that it was made for.
        name: Hub id or directory of the parent.
        weights: fingerprint of the parent.
        key: the config's key that names the parent: the model's, or that of the mask.

    Raises:
        ConfigError: the mask's own parent has other weights now.
    """
    other, noted = differ(mask.fingerprint, weights), mask.fingerprint
    if other and key == MASK:
        raise ConfigError(
            f"{key}: it was made for weights {noted} of '{name}', which now holds {weights}. If these are "
            f"meant, name them: --{MODEL} {name}."
        )
    if other or (other is None and name != mask.model):
        made = noted or "of which it notes no weights"
        rank_zero_warn(
            f"model: '{name}' ({weights}) is recovered with a mask made for '{mask.model}' ({made})."
        )


def note(module: Resumable) -> dict[str, Any]:
    """Return the identity of a run as plain values, which its checkpoints record."""
    return {
        "parent": module.name,
        "weights": module.weights,
        "teacher": module.teacher_weights,
        "settings": module.settings,
    }


def check(noted: dict[str, Any] | None, module: Resumable, resumes: bool) -> None:
    """Compare a run with the identity in its checkpoint.

    Args:
        noted: the identity, as :func:`note` returned it; None in checkpoints of earlier versions.
        module: the module of the run.
        resumes: whether training goes on, so that settings matter too.

    Raises:
        ConfigError: the parent or the teacher has other weights, or a setting that defines the run changed.
    """
    if noted is None:
        rank_zero_warn("ckpt_path: the checkpoint notes no model and no settings; they are not checked.")
        return
    differences = []
    if differ(noted["weights"], module.weights):
        was = f"'{noted['parent']}' ({noted['weights']})"
        differences.append(Change(module.parent_key, was, f"'{module.name}' ({module.weights})"))
    elif resumes and differ(noted["teacher"], module.teacher_weights):
        differences.append(Change(_TEACHER, noted["teacher"], module.teacher_weights))
    settings = changes(noted["settings"], module.settings) if resumes else []
    reported = [change for change in settings if change.among(FREE)]
    differences += [change for change in settings if not change.among([*FREE, *CONTENT])]
    refuse_changes(differences, module.accepted, "another run")
    for change in reported:
        if not change.among(CONTENT):
            rank_zero_warn(f"ckpt_path: {change}; the run goes on with the new value.")
