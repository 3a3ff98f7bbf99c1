"""Measure many masks on several batches, in the order that shares most.

A batch is finished before the next is begun, so that the streams of one batch at a time are remembered. On
each, the masks go by their gates, open ones first: a walk through the tree of their prefixes, depth first.

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


class Walker(Probe):
    """A probe that remembers values, and streams while it walks; a subclass runs a batch under gates.

    A quick measurement takes the first quarter of the batches: enough to drop bad masks, not to rank good
    ones.

    Args:
        batches: number of calibration batches.
    """

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self._known: dict[tuple[Measure, int, Front], float] = {}

    @property
    def memory(self) -> PrefixMemory:
        """What holds the streams."""
        raise NotImplementedError

    def run(self, batch: int, gates: Front, by: Measure, prefixes: Prefixes) -> float:
        """Return the sum of a measure over the positions of a batch under gates."""
        raise NotImplementedError

    def average(self, sums: Sequence[float]) -> float:
        """Return the mean over all positions of the first batches from their sums."""
        raise NotImplementedError

    def divergence(self, gates_L: Tensor, quick: bool = False) -> float:
        """Return the mean divergence (nats per token) of the model under ``gates_L``, as exported."""
        return self.walk([gates_L], "divergence", quick=quick)[0]

    def cross_entropy(self, gates_L: Tensor) -> float:
        """Return the mean cross-entropy (nats per supervised token) under ``gates_L`` on the labels."""
        return self.walk([gates_L], "cross-entropy", "cross_entropy")[0]

    def walk(
        self, masks: Sequence[Tensor], about: str, by: Measure = "divergence", quick: bool = False
    ) -> list[float]:
        """Measure many masks, each once on a batch, in an order that shares prefixes; see :class:`Probe`."""
        asked: list[Front] = [tuple(gates_U.tolist()) for gates_U in masks]
        read = range(ceil(self.batches / 4) if quick else self.batches)
        ordered = sorted(set(asked), reverse=True)
        new = [(b, gates) for b in read for gates in ordered if (by, b, gates) not in self._known]
        for batch, group in groupby(track(new, about), key=lambda each: each[0]):
            with self.memory.of(batch) as prefixes:
                for _, gates in group:
                    self._known[by, batch, gates] = self.run(batch, gates, by, prefixes)
        return [self.average([self._known[by, b, gates] for b in read]) for gates in asked]
