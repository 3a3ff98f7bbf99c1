"""The contract of a term, one summand of a recovery's loss.

A term sees one :class:`Step` and nothing else. It knows neither the module that trains nor the source of the
teacher's signal. Its value is a mean over the supervised positions of the whole batch, so padding, packing
and the split into ranks and micro-batches do not change it.

Shapes: N supervised positions, H hidden, F channels of a feed-forward.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
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
    """Holds what the terms of a loss may read of one batch.

    Attributes:
        head: output head of the student.
        hidden_NH: the student's final hidden states at the supervised positions.
        labels_N: tokens that these positions predict.
        signal: the teacher's distribution at these positions.
        mask: mask by which the student was cut.
        whole: batch of all ranks that this batch is a part of; None if this batch is the whole.
        student: residual stream ``[N, H]`` behind each layer of the student that some term compares
            (:meth:`Term.pairs`), by the layer's number.
        parent: the same of the parent, by the parent's numbers.
        activations: what enters, in each feed-forward of the student, the linear map that writes to the
            stream ``[N, F]``, by the layer's number; empty unless some term reads it.
    """

    head: OutputHead
    hidden_NH: Tensor
    labels_N: Tensor
    signal: Signal
    mask: Mask
    whole: WholeBatch | None = None
    student: Mapping[int, Tensor] = field(default_factory=dict)
    parent: Mapping[int, Tensor] = field(default_factory=dict)
    activations: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def count(self) -> float:
        """What a term divides its sum over this rank's positions by.

        The mean of the ranks' quotients is then the mean over the positions of all ranks.
        """
        return (len(self.hidden_NH) if self.whole is None else self.whole.share) or 1


class Term(ABC):
    """Computes one summand of a loss.

    A subclass defines :meth:`loss`. One that compares inner layers defines :meth:`pairs` too.
    """

    activations = False
    """Whether the term reads what the student's feed-forwards compute."""
    local = False
    """Whether its gradient stays within each layer that it compares, and reaches none before."""

    def pairs(self, mask: Mask) -> tuple[Pair, ...]:
        """Return the pairs of layers whose streams the term compares; none by default.

        Raises:
            ConfigError: the term is undefined for this mask.
        """
        return ()

    @classmethod
    def compares(cls) -> bool:
        """Return whether the term compares inner layers, so that its teacher must run live."""
        return cls.pairs is not Term.pairs

    @abstractmethod
    def loss(self, step: Step) -> dict[str, Tensor]:
        """Return the term's value as ``loss``, a scalar, and figures without gradient, logged by their names.

        Divide sums over positions by ``step.count``, not by their number on this rank: the mean of the ranks'
        values must be the mean over all their positions.
        """
