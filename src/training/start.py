"""Start a recovery from an earlier one of the same mask, so that stages of recovery follow each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from transformers import PreTrainedModel

from src.errors import ConfigError
from src.mask import Mask
from src.models.cut import cut
from src.models.fingerprint import differ
from src.models.loading import weightless
from src.training import checkpoints
from src.training.checkpoints import UNAVERAGED
from src.training.scopes import check_units, load_student


def check_start(checkpoint: str, mask: Mask) -> dict[str, Any]:
    """Return the content of an earlier recovery's checkpoint, without weights, if it is one of this mask.

    Args:
        checkpoint: a file, or a directory that ranks wrote in parts.
        mask: mask of the recovery that is to start from it.

    Raises:
        ConfigError: there is none, it is not of a recovery, or it was trained with another mask.
    """
    if not Path(checkpoint).exists():
        raise ConfigError(
            f"model.patch: '{checkpoint}' given; accepted: adapters, an existing checkpoint of an earlier "
            f"recovery, the class_path of a repair (src.linear_patch.LinearPatch), or null."
        )
    content = checkpoints.record(checkpoint)
    if "recovery" not in content:
        raise ConfigError(f"model.patch: '{checkpoint}' is no checkpoint of a recovery. Give one that is.")
    check_units(content["recovery"], mask)
    return content


def check_averaged(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Refuse to go on from an average with the optimiser of the weights that it is the average of.

    Raises:
        ConfigError: the checkpoint's weights are averaged, and the run that resumes from it does not average.
    """
    averages = any(type(each).__name__ == "AveragedWeights" for each in getattr(trainer, "callbacks"))  # noqa: B009
    if UNAVERAGED in checkpoint and trainer.state.fn == TrainerFn.FITTING and not averages:
        raise ConfigError(
            "ckpt_path: the checkpoint's weights are an average (src.callbacks.AveragedWeights), and this "
            "run does not average. Give configs/recover/averaged.yaml again; or start anew from the average, "
            "with the checkpoint as model.patch."
        )


def started(
    parent: PreTrainedModel, mask: Mask, checkpoint: str, weights: str | None
) -> tuple[PreTrainedModel, str]:
    """Return the cut model with the weights of an earlier recovery, adapters merged; and that one in words.

    Args:
        parent: the whole model.
        mask: of both recoveries.
        checkpoint: of the earlier one.
        weights: fingerprint of the parent.

    Raises:
        ConfigError: the earlier recovery was of another mask or parent.
    """
    if weightless.get():
        return cut(parent, mask), ""  # a plan: of the same shapes
    content = check_start(checkpoint, mask)
    noted, earlier = content.get("identity") or {}, content["recovery"]
    if differ(noted.get("weights"), weights):
        raise ConfigError(
            f"model.patch: '{checkpoint}' was trained under '{noted['parent']}' ({noted['weights']}), and "
            f"this parent is another model ({weights}). Give a checkpoint of this parent."
        )
    before = f", after {earlier['patch']}" if earlier.get("patch") else ""
    told = f"an earlier recovery on {earlier['tokens']:,} tokens ({earlier['scope']}){before}"
    return load_student(parent, mask, checkpoint), told
