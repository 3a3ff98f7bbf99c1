"""Measure how far a model is from its teacher on held-out text: KL, agreement, loss.

Shapes: B rows, T tokens, N judged positions (those that predict a supervised token), V vocabulary.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from src.errors import ConfigError
from src.evaluate.intervals import interval
from src.losses.blocks import blocks
from src.losses.signals import FLOOR
from src.models.vocabulary import within
from src.training.progress import track

ROW_SUMS = ("loss", "teacher_loss", "kl", "agreement", "tokens")
"""Columns of :func:`row_sums`."""
HELD = 2**30
"""Bytes of float32 logits that a model gives at once, at most; rows that give more are read in parts."""
LARGEST_LOSS = math.log(sys.float_info.max)
"""Largest loss (nats) whose perplexity is a finite number."""


def held_out(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batches: Iterable[dict[str, Tensor]],
    chunk: int = 1024,
) -> dict[str, Any]:
    """Measure divergence, agreement and loss, as means over the supervised tokens of all batches.

    The models' own logits are judged, over the student's whole vocabulary, in float32.

    Args:
        student: the model to judge.
        teacher: the model that it should behave like; None measures loss and perplexity alone.
        batches: ``input_ids, attention_mask, labels`` (not shifted), each ``[B, T]``.
        chunk: tokens whose float32 logits are held at once.

    Returns:
        ``loss`` (nats), ``perplexity``, ``tokens``; beside a teacher also ``kl`` (nats, teacher to
        student) and its ``kl_interval`` of 95 %, ``agreement`` and ``teacher_loss``; and, so that
        evaluations can be compared row by row, ``row_kl``, summed over tokens, and ``row_tokens``.

    Raises:
        ConfigError: nothing is supervised.
    """
    return figures(row_sums(student, teacher, batches, chunk), str(student.name_or_path), teacher is not None)


def figures(sums_RC: Tensor, name: str, beside: bool) -> dict[str, Any]:
    """Return the figures of :func:`held_out` from the sums over each row.

    Args:
        sums_RC: from :func:`row_sums`.
        name: of the model, for messages.
        beside: whether the sums compare with a teacher.

    Raises:
        ConfigError: nothing is supervised, or the loss is too large for a perplexity.
    """
    sums = sums_RC.sum(0)
    tokens = int(sums[-1])
    if tokens == 0:
        raise ConfigError("--data: no row has a supervised token. Check --answer and --max-length.")
    loss, teacher_loss, kl, agreement = (sums[:-1] / tokens).tolist()
    if not (loss < LARGEST_LOSS and math.isfinite(teacher_loss) and math.isfinite(kl)):
        raise ConfigError(
            f"--model: '{name}' has a loss of {loss} nats per token (its teacher "
            f"{teacher_loss}), of which there is no perplexity. Its values overflow: try --dtype float32."
        )
    alone = {"loss": loss, "perplexity": math.exp(loss), "tokens": tokens}
    if not beside:
        return alone
    ends = interval(sums_RC[None, :, 2].numpy(), sums_RC[:, -1].numpy())
    compared = {"kl": kl, "agreement": agreement, "teacher_loss": teacher_loss}
    rows = {"row_kl": sums_RC[:, 2].tolist(), "row_tokens": sums_RC[:, -1].tolist()}
    return {**alone, **compared, "kl_interval": [ends["low"], ends["high"]], **rows}


@torch.inference_mode()
def row_sums(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batches: Iterable[dict[str, Tensor]],
    chunk: int = 1024,
) -> Tensor:
    """Return the figures of :func:`held_out` summed over each row: ``[rows, 5]`` float64.

    The columns are :data:`ROW_SUMS`; the arguments are those of :func:`held_out`.
    """
    rows = [torch.zeros(0, len(ROW_SUMS), dtype=torch.float64)]
    for batch in (part for whole in track(batches, "batches of text") for part in _parts(whole, student)):
        labels_BT = batch["labels"][:, 1:].to(student.device)
        judged_BT = labels_BT != -100
        labels_N = labels_BT[judged_BT]
        own_NV = _logits(student, batch)
        other_NV = own_NV if teacher is None else _logits(teacher, batch).to(student.device)
        chunks = zip(*(x.split(chunk) for x in (own_NV, other_NV, labels_N)), strict=True)
        compared_NC = torch.cat([_compare(*part) for each in chunks for part in blocks(*each)])
        row_N = judged_BT.nonzero()[:, 0]
        sums_BC = compared_NC.new_zeros(len(labels_BT), len(ROW_SUMS)).index_add_(0, row_N, compared_NC)
        rows.append(sums_BC.cpu())
    return torch.cat(rows)


def _parts(batch: dict[str, Tensor], model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """Yield a batch in parts of as many rows as :data:`HELD` has room for, at least one, in their order."""
    row = 4 * batch["labels"].shape[1] * int(model.config.get_text_config().vocab_size)
    parts = (value.split(max(1, HELD // row)) for value in batch.values())
    return (dict(zip(batch, part, strict=True)) for part in zip(*parts, strict=True))


def of_teacher(sums_RC: Tensor) -> Tensor:
    """Return the teacher's own sums, from those of a model that was compared with it; same shape.

    The teacher's loss is its whole vocabulary's either way, so it need not read the rows once more alone.
    """
    _, loss_R, _, _, tokens_R = sums_RC.unbind(-1)
    return torch.stack([loss_R, loss_R, torch.zeros_like(loss_R), tokens_R, tokens_R], -1)


def _logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Return the logits ``[N, V]`` at the judged positions, on the device of the model."""
    inputs = {key: value.to(model.device) for key, value in batch.items()}
    judged_BT = inputs.pop("labels")[:, 1:] != -100
    logits_BTV: Tensor = model(**inputs, use_cache=False).logits
    return logits_BTV[:, :-1][judged_BT]


def _compare(own_NV: Tensor, other_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Return columns ``[N, 5]``: own loss, the other's loss, KL(other || own), equal first choices, one.

    The other's distribution is that over the tokens that the own model has.
    """
    own_NV, other_NV = own_NV.float().log_softmax(-1), other_NV.float()
    losses = [F.nll_loss(x, labels_N, reduction="none") for x in (own_NV, other_NV.log_softmax(-1))]
    other_NV = within(other_NV, own_NV.shape[-1]).log_softmax(-1).clamp_min(FLOOR)
    kl_N = F.kl_div(own_NV.clamp_min(FLOOR), other_NV, log_target=True, reduction="none").sum(-1)
    agree_N = own_NV.argmax(-1) == other_NV.argmax(-1)
    return torch.stack([*losses, kl_N, agree_N, torch.ones_like(kl_N)], -1).double()
