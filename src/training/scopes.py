"""Choose which weights of a cut model a recovery trains, and load the recovered model from its checkpoint.

A *scope* is ``full`` (all weights), ``cut_adjacent`` (the layers next to removed ones) or ``lora``
(adapters).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from src.errors import ConfigError, first_line
from src.mask import WIDE, Mask
from src.models.adapters import adapted, unwrapped
from src.models.cut import cut
from src.models.layers import decoder_layers
from src.training import checkpoints

Scope = Literal["full", "cut_adjacent", "lora"]


def check_units(recovery: dict[str, Any], mask: Mask) -> None:
    """Refuse a checkpoint of another mask; shapes do not show that, since cuts of one depth share them.

    Args:
        recovery: what the checkpoint records of its recovery, with its kept units and their kind.
        mask: the mask that is given.

    Raises:
        ConfigError: the checkpoint was trained with other units; the message names both sets.
    """
    keep, unit = tuple(recovery["keep"]), recovery.get("unit", "layer")
    if (keep, unit) != (mask.keep, mask.unit) and mask.wide and len(keep) > mask.num_layers:
        raise ConfigError(
            f"checkpoint: it was trained with another choice of units, {len(keep):,} {unit}s, than the mask, "
            f"which keeps {mask.listed}. Give the mask that it was trained with."
        )
    if (keep, unit) != (mask.keep, mask.unit):
        raise ConfigError(
            f"checkpoint: it was trained with {unit}s {list(keep)}, but the mask keeps {mask.unit}s "
            f"{list(mask.keep)}. Give the mask that it was trained with."
        )


def check_scope(scope: Scope, mask: Mask, compared: Collection[int] | None = None) -> None:
    """Refuse a scope that trains nothing under this mask.

    Args:
        scope: which weights train.
        mask: the mask of the cut.
        compared: layers of the cut model outside of which nothing trains; None if there is no such limit.

    Raises:
        ConfigError: the layers next to removed ones are asked for, and the mask removes none, but KV groups
            or channels; or none of these layers is compared.
    """
    if scope == "cut_adjacent" and mask.wide:
        raise ConfigError(
            f"model.scope: 'cut_adjacent' trains the blocks beside removed layers, and a mask of "
            f"{WIDE[mask.unit]} removes none. Accepted here: full, lora."
        )
    if scope == "cut_adjacent" and compared is not None and not cut_adjacent(mask) & set(compared):
        raise ConfigError(
            "model.scope: 'cut_adjacent' trains none of the layers that the local term compares. Accepted: "
            "layers: all or gaps, or scope: full."
        )


def cut_adjacent(mask: Mask) -> set[int]:
    """Return the positions, in the cut model, of the layers next to removed ones (CLP, arXiv 2510.23652).

    They lie before or behind a gap, or at an end of the model where layers were removed. A recombined layer,
    whose halves come from two layers of the parent, is one of them too.
    """
    near = {i for gap in mask.gaps for i in (gap, gap + 1)}
    pairs = enumerate(zip(mask.attention, mask.feed_forward, strict=True))
    near |= {i for i, (attention, feed_forward) in pairs if attention != feed_forward}
    if mask.attention[0] != 0:
        near.add(0)
    if mask.feed_forward[-1] != mask.num_layers - 1:
        near.add(mask.depth - 1)
    return near


def scoped(student: PreTrainedModel, mask: Mask, scope: Scope, rank: int) -> PreTrainedModel:
    """Freeze all weights of the cut model but those of a scope; return the model.

    Args:
        student: the cut model; it is changed in place.
        mask: the mask of the cut.
        scope: which weights train.
        rank: rank of the adapters, for ``lora``, which wraps the model.

    Raises:
        ConfigError: ``lora`` is asked and peft is not installed.
    """
    student.train().requires_grad_(scope == "full")
    if scope == "cut_adjacent":
        _, layers = decoder_layers(student)
        for i in cut_adjacent(mask):
            layers[i].requires_grad_(True)
    if scope == "lora":
        return adapted(student, rank)
    return student


def confine(student: PreTrainedModel, layers: Collection[int]) -> None:
    """Freeze what lies outside of some layers of a cut model, with or without adapters."""
    chosen = [decoder_layers(student)[1][index] for index in layers]
    inside = {id(parameter) for layer in chosen for parameter in layer.parameters()}
    for parameter in student.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in inside)


def recompute(student: PreTrainedModel) -> None:
    """Let a model recompute its layers in the backward pass, to save memory.

    Raises:
        ConfigError: transformers does not offer it for this family.
    """
    try:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as e:
        raise ConfigError(
            f"model.checkpoint_activations: a '{student.config.model_type}' does not offer it. Set it to "
            f"false, and lower data.batch_size if memory is short."
        ) from e


def narrower(stored: torch.dtype, trained: torch.dtype) -> bool:
    """Return whether a type to store weights in would round those that were trained in another."""
    return trained.is_floating_point and torch.promote_types(stored, trained) != stored


def load_student(parent: PreTrainedModel, mask: Mask, checkpoint: str) -> PreTrainedModel:
    """Return the recovered model as a plain one: the cut parent with a checkpoint's weights.

    Adapters are merged. Nothing is rounded: if the parent's type cannot hold the trained weights, the model
    is in float32.

    Args:
        parent: the model that the mask belongs to.
        mask: the mask of the recovery.
        checkpoint: a file, or a directory that ranks wrote in parts (:mod:`src.training.checkpoints`).

    Raises:
        ConfigError: the checkpoint is unreadable, not of a recovery, or of another mask.
    """
    try:
        recovery = checkpoints.record(checkpoint)["recovery"]
        check_units(recovery, mask)
        scope, rank = recovery["scope"], recovery["rank"]
        state = {k.removeprefix("model."): v for k, v in checkpoints.weights(checkpoint).items()}
        student = scoped(cut(parent, mask), mask, scope, rank)
        own = {key: tensor.dtype for key, tensor in student.state_dict().items()}
        if any(narrower(own[key], trained.dtype) for key, trained in state.items() if key in own):
            student = student.float()
        student.load_state_dict(state)
    except (OSError, KeyError, RuntimeError) as e:
        raise ConfigError(
            f"checkpoint: '{checkpoint}' does not fit this model and mask: {first_line(e)}"
        ) from e
    plain = unwrapped(student) if scope == "lora" else student
    plain.eval()
    return plain
