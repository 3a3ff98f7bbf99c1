"""The contract of a term, one summand of a recovery's loss.

A term sees one :class:`Step` and nothing else: neither the module that trains, nor where the teacher's signal
comes from. Its value is a mean over the supervised positions of the whole batch, so that padding, packing and
the split into ranks and micro-batches change nothing.

Shapes: N supervised positions, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from src.losses.signals import Signal
from src.mask import Mask
from src.models.head import OutputHead
from src.training.ranks import WholeBatch

Pair = tuple[int, int]
"""A layer of the student, and the layer of the parent whose stream it is compared with."""


@dataclass(frozen=True)
class Step:
    """What one batch shows to the terms.

    Attributes:
        head: output head of the student.
        hidden_NH: the student's final hidden states at the supervised positions.
        labels_N: the tokens that these positions predict.
        signal: what the teacher says there.
        mask: which layers of the parent the student keeps.
        whole: the batch of all ranks that this one is a part of; None: it is on its own.
        student: the student's stream ``[N, H]`` behind those of its layers that terms ask for.
        parent: the parent's stream ``[N, H]`` behind those of its layers that terms ask for.
    """

    head: OutputHead
    hidden_NH: Tensor
    labels_N: Tensor
    signal: Signal
    mask: Mask
    whole: WholeBatch | None = None
    student: Mapping[int, Tensor] = field(default_factory=dict)
    parent: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def count(self) -> float:
        """What a sum over this rank's positions is divided by: the mean over the ranks is the whole mean."""
        return (len(self.hidden_NH) if self.whole is None else self.whole.share) or 1


class Term:
    """One summand of a loss; a subclass says :meth:`loss`, and :meth:`pairs` if it reads inner layers."""

    def pairs(self, mask: Mask) -> tuple[Pair, ...]:
        """The layers whose streams the term compares; none by default.

        Raises:
            ConfigError: the term cannot be had with this mask.
        """
        return ()

    def loss(self, step: Step) -> dict[str, Tensor]:
        """The value under ``loss``; beside it, without gradient, figures to log under their names.

        The value's mean over the ranks is its mean over the positions of all of them (:attr:`Step.count`).
        """
        raise NotImplementedError
