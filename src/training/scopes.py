"""What trains in a cut model; and the plain model that a checkpoint of its training holds."""

from __future__ import annotations

from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from src.errors import ConfigError, first_line
from src.mask import Mask
from src.models.adapters import adapted, unwrapped
from src.models.cut import cut
from src.models.layers import decoder_layers
from src.training import checkpoints

Scope = Literal["full", "cut_adjacent", "lora"]


def same_layers(recovery: dict[str, Any], mask: Mask) -> None:
    """Refuse a checkpoint of other layers: cuts of one depth have the same shapes, so shapes cannot tell.

    Raises:
        ConfigError: names both sets of layers.
    """
    if (tuple(recovery["keep"]), recovery.get("unit", "layer")) != (mask.keep, mask.unit):
        raise ConfigError(
            f"checkpoint: it does not fit the mask: it was trained with {recovery.get('unit', 'layer')}s "
            f"{list(recovery['keep'])}, "
            f"the mask keeps {list(mask.keep)}. Give the mask it was trained with."
        )


def cut_adjacent(mask: Mask) -> set[int]:
    """Positions, in the cut model, of the blocks on both sides of each cut (CLP, arXiv 2510.23652).

    A recombined block has a cut inside, between its halves.
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
    """Mark what trains in the cut model.

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


def recompute(student: PreTrainedModel) -> None:
    """Recompute the layers of a model in the backward pass.

    Raises:
        ConfigError: the family does not offer it.
    """
    try:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as e:
        raise ConfigError(
            f"model.checkpoint_activations: a '{student.config.model_type}' does not offer it. Set it to "
            f"false, and lower data.batch_size if memory is short."
        ) from e


def narrower(stored: torch.dtype, trained: torch.dtype) -> bool:
    """Whether weights that were ``trained`` in one type are rounded when ``stored`` in another."""
    return trained.is_floating_point and torch.promote_types(stored, trained) != stored


def load_student(parent: PreTrainedModel, mask: Mask, checkpoint: str) -> PreTrainedModel:
    """The recovered model as a plain one: the cut parent with a checkpoint's weights, adapters merged.

    The checkpoint may be a file, or a directory that ranks wrote in parts
    (:mod:`src.training.checkpoints`). Where the
    parent's type cannot hold what was trained, the model is in float32: nothing is rounded here.

    Raises:
        ConfigError: the checkpoint is unreadable, not of a recovery, or of another mask.
    """
    try:
        recovery = checkpoints.record(checkpoint)["recovery"]
        same_layers(recovery, mask)
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
