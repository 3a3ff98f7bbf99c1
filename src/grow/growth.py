"""Put removed units back into a recovered model, the most valuable first, without training.

A student that was cut from its parent and distilled from it still fits the parent: where the parent's own
units are put back, models of all sizes between the two arise, nearly as good as if each were distilled
(boomerang distillation, arXiv 2510.05064). Which unit comes next is decided greedily by the divergence from
the parent on calibration rows, forward only, which is better than an order by place (KLPatch, 2607.08170).

The kept units on both sides of a gap have learned to make up for what is missing in it. So a unit comes back
in one of three ways, and the best one counts: alone; with the two kept units beside it given the parent's own
weights again; or with all of the recovered model given the parent's weights again, as near the parent's size.
Boomerang distillation restores what lies before a gap that it fills. The choice is ours.

Shapes: N supervised positions, U units.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from src.data.batches import Batch, Supervised
from src.grow.host import Host
from src.losses.distill import Distillation
from src.losses.signals import Signal, live_signal
from src.mask import Mask
from src.models.head import OutputHead
from src.models.prefixes import Front, Prefixes, PrefixMemory
from src.policies.measuring import Measure
from src.policies.probe import PREFIX_GIB, prefix_memory
from src.policies.walk import Walk
from src.units.kinds import KINDS
from src.units.spaces import Kept

DIVERGENCE = Distillation(weight="none")
"""What a growth lowers: the divergence that a search lowers too, on the teacher's top 10."""


def growth(
    parent: PreTrainedModel, student: PreTrainedModel, mask: Mask, batches: Iterable[Batch]
) -> tuple[Host, Iterator[Grown]]:
    """Return the host and its sizes (:func:`grow`), measured on calibration batches.

    Args:
        parent: the whole model, which becomes the host.
        student: its recovered cut, in the same type and on the same device.
        mask: of that cut.
        batches: calibration rows.
    """
    on_device = ({key: value.to(parent.device) for key, value in batch.items()} for batch in batches)
    rows, head = [Supervised.of(batch) for batch in on_device], OutputHead(parent)
    signals = [parents_signal(head, each) for each in rows]
    host = Host(parent, student, mask)
    return host, grow(host, GrowthProbe(host, rows, signals))


@torch.no_grad()
def parents_signal(head: OutputHead, rows: Supervised) -> Signal:
    """Return what a model says at the supervised positions of a batch."""
    return live_signal(head, head.at(rows.batch, rows.index_N), DIVERGENCE.k)


class GrowthProbe(Walk):
    """Measures a host under masks, from the same calibration rows, until its weights change.

    Args:
        host: the model.
        rows: calibration batches.
        signals: what the parent says there.
        prefix_gib: memory for streams that masks share (GiB).
    """

    def __init__(
        self,
        host: Host,
        rows: Sequence[Supervised],
        signals: Sequence[Signal],
        prefix_gib: float = PREFIX_GIB,
    ) -> None:
        super().__init__(len(rows))
        self.host, self.rows, self.signals, self.head = host, rows, signals, OutputHead(host.model)
        self._memory = prefix_memory(self.head, host.gates, rows, prefix_gib)

    @property
    def memory(self) -> PrefixMemory:
        return self._memory

    def divergences(self, masks: Sequence[Kept], about: str) -> list[float]:
        """Return the divergence of the host under each mask, with the weights that it has now."""
        self._known.clear()
        self._memory = PrefixMemory(self.memory.units, self.memory.limit)
        gates = torch.zeros(len(masks), len(self.host.gates))
        for gates_U, kept in zip(gates, masks, strict=True):
            gates_U[list(kept)] = 1.0
        return self.walk(list(gates), about)

    @torch.no_grad()
    def run(self, batch: int, gates: Front, by: Measure, prefixes: Prefixes) -> float:
        rows, gates_U = self.rows[batch], torch.tensor(gates, device=self.host.model.device)
        with self.host.gates.remember(prefixes), self.host.gates.use(gates_U):
            hidden_NH = self.head.at(rows.batch, rows.index_N)
        return float(DIVERGENCE(self.head, hidden_NH, rows.labels_N, self.signals[batch])["loss"]) * len(rows)

    def average(self, sums: Sequence[float]) -> float:
        return sum(sums) / sum(map(len, self.rows[: len(sums)]))


@dataclass(frozen=True)
class Grown:
    """A size on the way from a recovered model to its parent.

    Attributes:
        keep: kept units.
        recovered: the host's parts with recovered weights; all others have the parent's own.
        kl: divergence from the parent on the calibration rows, nats a token.
    """

    keep: Kept
    recovered: frozenset[int]
    kl: float


def grow(host: Host, probe: GrowthProbe) -> Iterator[Grown]:
    """Yield the recovered model, then sizes with one more layer each, up to the parent's.

    The host holds the weights of the size that was yielded last.
    """
    mask, kind = host.mask, KINDS[host.mask.unit]
    now = Grown(mask.keep, host.parts, *probe.divergences([mask.keep], "the recovered model"))
    yield now
    for missing in reversed(range(mask.num_layers - mask.depth)):
        ways = dict[frozenset[int], list[Kept]]()
        for keep in kind.space(mask.num_layers, 0, missing).holding(now.keep):
            near = beside(now.keep, keep) & now.recovered
            for restored in dict.fromkeys((frozenset[int](), near, now.recovered)):
                ways.setdefault(restored, []).append(keep)
        found = list[Grown]()
        for restored, masks in ways.items():
            host.exchange(restored)
            values = probe.divergences(masks, f"sizes of {len(masks[0])} units")
            host.exchange(restored)
            found += [Grown(m, now.recovered - restored, kl) for m, kl in zip(masks, values, strict=True)]
        best = min(found, key=lambda each: each.kl)
        host.exchange(now.recovered - best.recovered)
        now = best
        yield now


def beside(kept: Kept, grown: Kept) -> frozenset[int]:
    """Return the units of ``kept`` right before and right behind those that ``grown`` has besides."""
    new = [unit for unit in grown if unit not in kept]
    before, behind = ([u for u in kept if u < new[0]][-1:], [u for u in kept if u > new[-1]][:1])
    return frozenset(before + behind)
