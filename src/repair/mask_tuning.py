"""Tune a scale for each part of a cut model that survives (Kwon et al., arXiv 2204.09656).

The paper prunes attention heads and channels of feed-forwards, then multiplies each that is left by a scale
x, such that the output of its attention or feed-forward comes nearest to that of the unpruned model. The
scales are columns of weights that the model has: they are folded into the last map of each, and the export
stays plain.

With A one column for each part, its contribution to the stream at all tokens, and B what it should all add up
to, the paper solves the normal equations ``M (x - 1) = r``, ``M = A^T A``, ``r = A^T B - M 1``, damped:

    x  =  1 + argmin |M y - r|^2 + damp^2 |y|^2  =  1 + (M^T M + damp^2 I)^-1 M^T r.

*The paper's*: the equations, damp 1, that the first attention stays as it is, and that tuning ends at the
first scale beyond 10. *Ours*: it serves masks of layers and halves too; the target is what the next kept
attention or feed-forward reads in the parent; a token's error is relative to that, as the next norm sees it;
M and r may be divided by the mean power of a part (``normalise``), since the damping acts on squares and
would else depend on the number of tokens and the size of the stream. A mixture of experts gets a scale for
each hidden channel that it writes. The paper's constant column is left out.

Shapes: B batch, T tokens, H hidden, F features of a writer, P parts of E = F / P features each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedModel

from src.data.batches import Batch
from src.errors import ConfigError
from src.mask import Mask
from src.models.layers import decoder_layers, first, text_config
from src.models.streams import silenced
from src.ranges import Count, NonNegative, checked
from src.repair.base import CutRepair
from src.repair.fold import Regression, Repair, change, regress
from src.repair.stream import run
from src.repair.writers import Writer, stream_writer

LARGEST = 10.0
"""Largest size of a scale; beyond it tuning ends."""


class MaskTuning(CutRepair):
    """Scales attention heads and feed-forward channels of a cut model, in order of computation.

    Args:
        data: calibration rows: JSONL, Parquet, text or a Hub id. None, in a recovery, is the first source of
            the text that it trains on.
        ridge: pull towards the scale 1, the paper's damp.
        normalise: whether it is relative to the mean power of a part's contribution.
        rows: largest number of calibration rows that are read; a scale needs fewer than a whole map.
        kwargs: which rows are read, and how; see :class:`src.repair.base.CutRepair`.
    """

    @checked
    def __init__(
        self,
        data: str | None = None,
        ridge: NonNegative = 0.1,
        normalise: bool = True,
        rows: Count = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(data, rows, **kwargs)
        self.ridge, self.normalise = ridge, normalise

    @property
    def fitted(self) -> str:
        return "scales of attention heads and feed-forward channels fitted to the parent's stream"

    def repair(
        self, student: PreTrainedModel, parent: PreTrainedModel, mask: Mask, calibration: Sequence[Batch]
    ) -> list[Repair]:
        """Fold the scales into the weights, one attention or feed-forward after the other."""
        repairs = list[Repair]()
        heads = getattr(text_config(student.config), "num_attention_heads", None) or 1
        for place in places(student, mask, calibration[0]):
            regression = place.lack(student, parent, calibration)
            map_FH = place.writer.map_FH
            each = len(map_FH) // heads if place.silent and len(map_FH) % heads == 0 else 1
            rise_F = self.rise(regression, map_FH, each)
            if not bool(((1 + rise_F).abs() <= LARGEST).all()):
                rank_zero_warn(
                    f"patch: a scale of {place.writer.name} in layer {place.index} would be beyond "
                    f"{LARGEST:g}, so tuning ends before it. A larger ridge holds the scales nearer to 1."
                )
                break
            delta_FH = torch.zeros_like(regression.cross_FH)  # its last row stays zero if there is a bias
            delta_FH[: len(map_FH)] = rise_F[:, None] * map_FH
            repairs.append(change(student, place.index, place.writer, regression, delta_FH))
        return repairs

    def rise(self, regression: Regression, map_FH: Tensor, each: int) -> Tensor:
        """Return ``x - 1`` for each feature ``[F]``, one value for the features of a part.

        Args:
            regression: of what is lacking on the writer's features.
            map_FH: what each feature adds to the stream.
            each: neighbouring features that are a part, E.
        """
        size = len(map_FH)
        gram_FF = regression.gram_FF[:size, :size] * (map_FH @ map_FH.T)
        m_PP = gram_FF.unflatten(1, (-1, each)).sum(2).unflatten(0, (-1, each)).sum(1)
        r_P = (regression.cross_FH[:size] * map_FH).sum(1).unflatten(0, (-1, each)).sum(1)
        power = m_PP.diagonal().mean().clamp_min(torch.finfo(m_PP.dtype).tiny)
        scale = power if self.normalise else torch.ones_like(power)
        eye_PP = torch.eye(len(r_P), dtype=torch.complex128, device=m_PP.device)
        # (M^2 + d^2)^-1 M is the real part of (M + i d)^-1, which does not square M's condition.
        damped_PP = (m_PP + 1e-12 * power * eye_PP) / scale + 1j * self.ridge * eye_PP
        y_P: Tensor = torch.linalg.solve(damped_PP, (r_P / scale).to(damped_PP)).real
        return y_P.repeat_interleave(each)


@dataclass(frozen=True)
class Place:
    """Where scales are tuned: an attention or a feed-forward of the cut model.

    Attributes:
        index: number of its layer.
        writer: the module of the layer that writes to the stream.
        source: layer of the parent whose output is what should be there.
        silent: path of the feed-forward's writer in both layers, if the stream in front of the feed-forward
            is meant, which is the output without it; else None.
    """

    index: int
    writer: Writer
    source: int
    silent: str | None

    def lack(
        self, student: PreTrainedModel, parent: PreTrainedModel, calibration: Sequence[Batch]
    ) -> Regression:
        """Return the regression of what the stream lacks there on the writer's features."""
        own, theirs = decoder_layers(student)[1][self.index], decoder_layers(parent)[1][self.source]
        last = dict[str, Tensor]()
        with ExitStack() as stack:
            for layer in (own, theirs) if self.silent else ():
                stack.enter_context(silenced(layer.get_submodule(self.silent or "")))
            hook = theirs.register_forward_hook(lambda _m, _a, out: last.update(h=first(out)))
            stack.callback(hook.remove)

            def target(batch: Batch, _: Tensor) -> Tensor:
                run(parent, batch, self.source)
                return last["h"]

            return regress(student, self.index, self.writer, calibration, target)


def places(student: PreTrainedModel, mask: Mask, batch: Batch) -> Iterator[Place]:
    """Yield each place where the stream may differ from the parent's, in order of computation.

    The attention of the first layer is none.

    Raises:
        ConfigError: nothing can be folded into a layer; see :func:`src.repair.writers.stream_writer`.
    """
    differs = mask.wide
    for index, (attention, feed_forward) in enumerate(zip(mask.attention, mask.feed_forward, strict=True)):
        inside = differs or attention != index or feed_forward != index
        differs = inside or mask.reads[index] != index + 1
        if not differs:  # of what is as in the parent no writer is looked for, which takes passes
            continue
        last = stream_writer(student, index, batch)
        if inside and index and (early := _earlier(student, index, batch, last)):
            yield Place(index, early, feed_forward, last.name)
        yield Place(index, last, mask.reads[index] - 1, None)


def _earlier(student: PreTrainedModel, index: int, batch: Batch, last: Writer) -> Writer | None:
    """Return the writer of a layer before its last one; None if the layer adds to the stream once."""
    with silenced(decoder_layers(student)[1][index].get_submodule(last.name)):
        try:
            return stream_writer(student, index, batch, before=last)
        except ConfigError:
            return None
