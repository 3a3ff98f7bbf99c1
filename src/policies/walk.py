"""Measure many masks on several batches, in the order in which the most work is shared.

Masks that agree on their first units share the stream behind these (:mod:`src.models.prefixes`). So a batch
is finished before the next is begun, and only its streams are held. On each batch the masks are sorted by
their gates, open ones first: a walk through the tree of shared prefixes, depth first.

Shapes: U units.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from math import ceil

from torch import Tensor

from src.models.prefixes import Front, Prefixes, PrefixMemory
from src.policies.measuring import Measure, Probe
from src.training.progress import track


class Walk:
    """Measures masks on several batches; remembers streams while it does, and the values for good.

    A subclass runs a batch under gates. A quick measurement takes the first quarter of the batches: enough to
    drop bad masks, not to rank good ones.

    Args:
        batches: number of calibration batches.
    """

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self._known: dict[tuple[Measure, int, Front], float] = {}

    @property
    def memory(self) -> PrefixMemory:
        """The memory for residual streams that masks share."""
        raise NotImplementedError

    def run(self, batch: int, gates: Front, by: Measure, prefixes: Prefixes) -> float:
        """Run a batch under gates; return the sum of a measure over its supervised positions.

        Args:
            batch: number of the batch.
            gates: one for each unit.
            by: what is measured.
            prefixes: remembered streams of this batch.
        """
        raise NotImplementedError

    def average(self, sums: Sequence[float]) -> float:
        """Return the mean of a measure over the supervised positions of the first batches, on all ranks.

        Args:
            sums: what :meth:`run` returned for batches 0 to ``len(sums) - 1``.
        """
        raise NotImplementedError

    def measured(self) -> dict[Front, float]:
        """Return the divergence under all gates that were measured on every batch."""
        by: Measure = "divergence"
        known = dict.fromkeys(gates for measure, _, gates in self._known if measure == by)
        keys = {gates: [(by, b, gates) for b in range(self.batches)] for gates in known}
        return {
            gates: self.average([self._known[key] for key in own])
            for gates, own in keys.items()
            if all(key in self._known for key in own)
        }

    def walk(
        self, masks: Sequence[Tensor], about: str, by: Measure = "divergence", quick: bool = False
    ) -> list[float]:
        """Measure many masks, each at most once on a batch, with shared prefixes; see :class:`Probe`."""
        asked: list[Front] = [tuple(gates_U.tolist()) for gates_U in masks]
        read = range(ceil(self.batches / 4) if quick else self.batches)
        ordered = sorted(set(asked), reverse=True)
        new = [(b, gates) for b in read for gates in ordered if (by, b, gates) not in self._known]
        for batch, group in groupby(track(new, about), key=lambda each: each[0]):
            with self.memory.of(batch) as prefixes:
                for _, gates in group:
                    self._known[by, batch, gates] = self.run(batch, gates, by, prefixes)
        return [self.average([self._known[by, b, gates] for b in read]) for gates in asked]


class Walker(Walk, Probe):
    """A probe that measures by walks; a subclass defines what else a policy may ask."""

    def divergence(self, gates_L: Tensor, quick: bool = False) -> float:
        """Return the mean KL (nats per token) from the teacher under gates ``[U]``, without adapters.

        Args:
            gates_L: one gate for each unit.
            quick: use a quarter of the batches.
        """
        return self.walk([gates_L], "divergence", quick=quick)[0]

    def cross_entropy(self, gates_L: Tensor) -> float:
        """Return the mean cross-entropy on the labels, in nats a supervised token, over all calibration rows.

        Args:
            gates_L: one gate for each unit, ``[U]``.
        """
        return self.walk([gates_L], "cross-entropy", "cross_entropy")[0]
