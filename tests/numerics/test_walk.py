"""Walks over masks: each is measured once, in the order that shares most, within the memory that is given."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise, product
from math import ceil

import pytest
import torch

from src.models.prefixes import Front, Prefixes, PrefixMemory
from src.policies.measuring import Measure
from src.policies.walk import Walk

U = 6
MASKS = [torch.tensor(gates) for gates in product((0.0, 1.0), repeat=U)]


class Counting(Walk):
    """Measures by a formula of gates and batch; runs units from the streams that it remembers."""

    def __init__(self, batches: int, limit: int = 10**6) -> None:
        super().__init__(batches)
        self._memory = PrefixMemory(U, limit)
        self.ran: list[tuple[Measure, int, Front]] = []
        self.units = 0
        self.most = 0

    @property
    def memory(self) -> PrefixMemory:
        return self._memory

    def run(self, batch: int, gates: Front, by: Measure, prefixes: Prefixes) -> float:
        self.ran.append((by, batch, gates))
        prefixes.begin(gates)
        h = torch.zeros(())
        for unit in range(prefixes.start, U):
            h = prefixes.stream(unit, h)
            h = 3 * h + gates[unit] * (batch + 1)
            self.units += 1
        self.most = max(self.most, len(self.memory) + len(prefixes))
        return float(h) * (-1 if by == "cross_entropy" else 1)

    def average(self, sums: Sequence[float]) -> float:
        return sum(sums) / len(sums)


def value(gates: Sequence[float], batches: int) -> float:
    """By hand: a number in base 3, times the mean of 1 to the number of batches."""
    return sum(3 ** (U - 1 - unit) * gate for unit, gate in enumerate(gates)) * (batches + 1) / 2


@pytest.mark.parametrize("limit", [0, 2, 9, 10**6])
@pytest.mark.parametrize("batches", [1, 3])
def test_the_values_are_those_of_each_mask_alone_in_the_order_asked(batches: int, limit: int) -> None:
    asked = MASKS[:]
    random.Random(0).shuffle(asked)
    asked += asked[:5]
    walk = Counting(batches, limit)
    assert walk.walk(asked, "masks") == [value(gates.tolist(), batches) for gates in asked]
    assert walk.most <= limit


def test_each_mask_is_run_once_on_a_batch_however_often_it_is_asked_for() -> None:
    walk = Counting(3)
    walk.walk([*MASKS[:9], *MASKS[:9]], "masks")
    walk.walk(MASKS[5:12], "masks")
    assert len(walk.ran) == len(set(walk.ran)) == 3 * 12
    walk.walk(MASKS[:2], "masks", by="cross_entropy")
    assert [by for by, *_ in walk.ran[36:]] == ["cross_entropy"] * 6


@pytest.mark.parametrize("batches", range(1, 10))
def test_a_quick_measurement_takes_the_first_quarter_and_is_no_final_one(batches: int) -> None:
    walk = Counting(batches)
    quarter = ceil(batches / 4)
    assert walk.walk(MASKS[3:5], "masks", quick=True) == [value(g.tolist(), quarter) for g in MASKS[3:5]]
    assert {batch for _, batch, _ in walk.ran} == set(range(quarter))
    whole = set() if quarter < batches else {tuple(gates.tolist()) for gates in MASKS[3:5]}
    assert set(walk.measured()) == whole
    walk.walk(MASKS[3:4], "masks")
    assert len(walk.ran) == 2 * quarter + batches - quarter, "what was read is not read again"
    assert walk.measured() == {tuple(g.tolist()): value(g.tolist(), batches) for g in MASKS[3:4]} | (
        {} if quarter < batches else {tuple(MASKS[4].tolist()): value(MASKS[4].tolist(), batches)}
    )


def test_other_measures_are_not_among_the_divergences() -> None:
    walk = Counting(2)
    walk.walk(MASKS[:4], "masks", by="cross_entropy")
    assert walk.measured() == {}


def test_a_batch_is_finished_before_the_next_and_neighbours_share_their_fronts() -> None:
    walk = Counting(3)
    walk.walk(MASKS, "masks")
    batches = [batch for _, batch, _ in walk.ran]
    assert batches == sorted(batches)
    gates = [front for _, batch, front in walk.ran if batch == 0]
    assert gates == sorted(gates, reverse=True)
    assert gates[0] == (1.0,) * U
    shared = sum(
        next(n for n, (a, b) in enumerate(zip(x, y, strict=True)) if a != b) for x, y in pairwise(gates)
    )
    assert walk.units == 3 * (len(MASKS) * U - shared), "each edge of the tree once"


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 20, 39])
def test_no_more_streams_are_held_than_the_limit_and_more_memory_never_costs_work(limit: int) -> None:
    few, more = Counting(4, limit), Counting(4, limit + 1)
    for walk in (few, more):
        walk.walk(MASKS[::3], "masks")
        walk.walk(MASKS[::2], "masks")
        assert walk.most <= walk.memory.limit
    assert len(few.memory) <= limit
    if few.memory.every == more.memory.every:
        assert more.units <= few.units
    assert (few.memory.every is None) is (limit < 2)
