"""Laws of the evolutionary rivals: switches, steps of selection, genomes of segments."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from src.errors import ConfigError
from src.mask import Unit
from src.plan.work import calibration
from src.policies import LevelSwitch, MaskPolicy, RandomSearch, SegmentEvolution, Tail
from src.policies.measuring import Measure, Probe
from src.policies.swaps import successor
from src.search import MaskSearch
from src.units.spaces import Kept
from tests.numerics.test_polish import Costs
from tests.planning import L, write_config

NAN = float("nan")


class Toy(Probe):
    """A probe over made-up costs of removed units and of pairs of them; notes what it measures, and how."""

    def __init__(self, policy: MaskPolicy, pairs: float = 0.3, seed: int = 0) -> None:
        self.costs = Costs(policy.space, seed, pairs)
        self.asked: list[tuple[bool, list[Kept]]] = []
        self.broken = set[Kept]()

    def of(self, kept: Kept) -> float:
        return NAN if kept in self.broken else self.costs.of(kept)

    def walk(
        self, masks: Sequence[Tensor], about: str, by: Measure = "divergence", quick: bool = False
    ) -> list[float]:
        sets = [tuple(gates_U.nonzero().flatten().tolist()) for gates_U in masks]
        self.asked.append((quick, sets))
        return [self.of(kept) for kept in sets]

    def finals(self, gates_L: Tensor | None) -> Iterator[Tensor]:
        """One state, as far from that of open gates as a mask costs."""
        if gates_L is None:
            yield torch.tensor([[0.0, 1.0]])
        else:
            (value,) = self.walk([gates_L], "states")
            yield torch.tensor([[math.sqrt(value), 1.0]])

    def mean(self, sums: Tensor, counts: Tensor) -> Tensor:
        return sums / counts

    @property
    def measured(self) -> list[Kept]:
        return [kept for _, sets in self.asked for kept in sets]


def made(policy: MaskPolicy, layers: int = 9, remove: int = 3, unit: Unit = "layer", **keys: Any) -> Toy:
    """Set a policy up, let it measure a toy, and return that."""
    policy.setup(layers, remove, unit=unit, width=4 if unit == "kv_group" else 1)
    toy = Toy(policy, **keys)
    policy.initialise(toy)
    return toy


# ---------------------------------------------------------------- level switches


@pytest.mark.parametrize("unit", ["layer", "half", "kv_group"])
def test_each_offspring_is_a_legal_mask_of_one_size(unit: Unit) -> None:
    keep = [] if unit == "kv_group" else [0]
    policy = LevelSwitch(always_keep=keep, generations=5)
    toy = made(policy, layers=5, remove=2, unit=unit)
    assert all(policy.space.legal(kept) for kept in toy.measured)
    assert len({*toy.measured}) > 5


@pytest.mark.parametrize("unit", ["layer", "half"])
def test_one_switch_leads_to_every_neighbour_and_to_nothing_else(unit: Unit) -> None:
    policy, chance = LevelSwitch(switches=1), random.Random(0)
    policy.setup(5, 2, unit=unit)
    parent = policy.space.uniform(torch.Generator().manual_seed(1))
    near = {*policy.space.neighbours(parent)}
    assert {policy.switched(parent, chance) for _ in range(40 * len(near))} == near


def test_the_number_of_switches_is_the_lesser_of_two_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1 to 3 each: one switch in 5 of 9 cases, two in 3, three in 1."""
    policy, chance = LevelSwitch(), random.Random(0)
    policy.setup(9, 3)
    monkeypatch.setattr(policy.space, "neighbours", lambda kept: iter([(*kept, 0)]))
    counts = Counter(len(policy.switched((), chance)) for _ in range(9000))
    for switches, of_nine in ((1, 5), (2, 3), (3, 1)):
        p = of_nine / 9
        assert abs(counts[switches] - 9000 * p) < 5 * math.sqrt(9000 * p * (1 - p))


def test_a_generation_measures_all_on_few_rows_and_the_survivors_beside_the_parent_on_all() -> None:
    policy = LevelSwitch(generations=6, offspring=7, survivors=2, initial=5)
    toy = made(policy)
    assert [quick for quick, _ in toy.asked] == [True] + 6 * [True, False]
    assert len(toy.asked[0][1]) == 5
    parent = min(toy.asked[0][1], key=toy.of)
    for (_, offspring), (_, field) in zip(toy.asked[1::2], toy.asked[2::2], strict=True):
        assert len({*offspring} - {parent}) == len(offspring) <= 7
        assert field == [parent, *sorted(offspring, key=toy.of)[:2]]
        parent = min(field, key=toy.of)  # never worse, as it is one of them
    assert policy.harden() == parent


def test_without_a_generation_it_is_the_best_of_random_masks() -> None:
    policy, control = LevelSwitch(generations=0, initial=12, seed=3), RandomSearch(masks=12, seed=3)
    made(policy)
    made(control)
    assert policy.harden() == control.harden()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("unit", ["layer", "half"])
def test_where_units_cost_alone_it_ends_at_the_best_of_all(unit: Unit, seed: int) -> None:
    policy = LevelSwitch(seed=seed, generations=8)
    toy = made(policy, layers=5, remove=2, unit=unit, pairs=0.0, seed=seed)
    assert toy.of(policy.harden()) == pytest.approx(min(map(toy.of, policy.space)))


def test_a_space_of_one_mask_needs_no_switch() -> None:
    policy = LevelSwitch(always_keep=[0, 1, 2])
    made(policy, layers=5, remove=2)
    assert policy.harden() == (0, 1, 2)


def test_what_is_best_of_equal_ones_or_no_number_never_replaces_a_mask() -> None:
    values = {(0,): 1.0, (1,): 1.0, (2,): NAN, (3,): 0.5, (4,): 0.4}

    def measure(masks: Sequence[Kept], quick: bool) -> list[float]:
        return [values[kept] * (-1 if quick else 1) for kept in masks]  # few rows rank them the wrong way

    assert successor((0,), [(1,)], measure, 1) == (0,)
    assert successor((0,), [(2,)], measure, 1) == (0,)
    assert successor((2,), [(1,)], measure, 1) == (1,)
    assert successor((0,), [], measure, 1) == (0,)
    assert successor((0,), [(1,), (3,), (4,)], measure, 1) == (0,), "the one that few rows like"
    assert successor((0,), [(1,), (3,), (4,)], measure, 3) == (4,)


# ---------------------------------------------------------------- genomes of segments


@pytest.mark.parametrize(("layers", "segments", "remove"), [(9, 3, 4), (10, 4, 3), (7, 7, 2), (6, 1, 2)])
def test_the_repair_meets_the_budget_from_anywhere_and_moves_no_legal_genome(
    layers: int, segments: int, remove: int
) -> None:
    policy, chance = SegmentEvolution(segments=segments, always_keep=[1]), random.Random(0)
    policy.setup(layers, remove)
    spans = [range(least, len(part) + 1) for least, part in zip(policy.least, policy.parts, strict=True)]
    for genes in itertools.product(*spans):
        genome = policy.repaired(genes, chance)
        assert sum(genome) == layers - remove == len(policy.kept(genome))
        assert all(gene in span for gene, span in zip(genome, spans, strict=True))
        assert 1 in policy.kept(genome)
        assert policy.repaired(genome, chance) == genome


def test_a_genome_keeps_the_first_layers_of_each_segment() -> None:
    policy = SegmentEvolution(segments=3)
    policy.setup(10, 4)
    assert [[*part] for part in policy.parts] == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]
    assert policy.kept((3, 1, 2)) == (0, 1, 2, 3, 6, 7)
    assert policy.kept((3, 3, 0)) == (0, 1, 2, 3, 4, 5), "a segment may be left out"


def test_one_segment_leaves_the_last_layers_out_and_as_many_as_layers_allow_every_mask() -> None:
    one, tail, each = SegmentEvolution(segments=1), Tail(), SegmentEvolution(segments=6, population=200)
    for policy in (one, tail):
        made(policy, layers=6, remove=2)
    assert one.harden() == tail.harden() == (0, 1, 2, 3)
    toy = made(each, layers=6, remove=2)
    assert sorted({*toy.measured}) == sorted(each.space)
    assert each.harden() == min(each.space, key=toy.of)


@pytest.mark.parametrize("fitness", ["divergence", "frechet"])
def test_the_best_fitness_never_falls_and_no_genome_is_measured_twice(fitness: Any) -> None:
    values = []
    for generations in range(8):
        policy = SegmentEvolution(fitness=fitness, segments=6, population=6, generations=generations)
        toy = made(policy, layers=18, remove=6)
        values.append(toy.of(policy.harden()))
        assert len({*toy.measured}) == len(toy.measured) <= 6 + 3 * generations
        assert values[-1] == min(map(toy.of, toy.measured))
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0]


def test_both_fitnesses_agree_where_they_measure_the_same_and_a_broken_model_never_wins() -> None:
    ends = []
    for fitness in ("divergence", "frechet"):
        policy = SegmentEvolution(fitness=fitness, segments=6, population=300)  # type: ignore[arg-type]
        policy.setup(6, 2)
        toy = Toy(policy)
        best, second, *_ = sorted(policy.space, key=toy.of)
        toy.broken = {best}
        policy.initialise(toy)
        assert best in toy.measured
        assert policy.harden() == second
        ends.append(toy.measured)
    assert ends[0] == ends[1]


def test_a_mutant_changes_no_gene_or_all() -> None:
    still, moving, chance = SegmentEvolution(mutation=0), SegmentEvolution(mutation=1), random.Random(0)
    for policy in (still, moving):
        policy.setup(32, 8)
    genome = still.drawn(chance)
    assert {still.mutant(genome, chance) for _ in range(20)} == {genome}
    assert len({moving.mutant(genome, chance) for _ in range(20)}) > 15


def test_what_has_no_genome_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"policy.segments: 7 asked.*Accepted: 1 to 6"):
        SegmentEvolution(segments=7).setup(6, 2)
    with pytest.raises(ConfigError, match=r"remove: 3 layers asked.*only 2 are left.*LevelSwitch"):
        SegmentEvolution(segments=2, always_keep=[0, -1]).setup(6, 3)
    SegmentEvolution(segments=2, always_keep=[0, -1]).setup(6, 2)
    with pytest.raises(ConfigError, match=r"model.unit: 'half' with SegmentEvolution"):
        SegmentEvolution().setup(8, 2, unit="half")


# ---------------------------------------------------------------- plans and records


def test_a_plan_counts_their_passes(tmp_path: Path) -> None:
    """With one segment there is one mask, and with no offspring the random ones are measured alone."""
    model, rows = write_config(tmp_path / "model.json"), 8

    def passes(policy: MaskPolicy) -> float | None:
        return calibration(MaskSearch(model, policy, calibration_batches=rows, remove=1), 0)

    signals, soft, hard = rows, rows, rows * (L - 1) / L
    end = signals + hard  # the hardened mask, which is also the soft one
    assert passes(Tail()) == pytest.approx(end)
    assert passes(SegmentEvolution(segments=1)) == pytest.approx(rows + hard + end)
    assert passes(SegmentEvolution(segments=1, fitness="frechet")) == pytest.approx(soft + hard + end)
    quick = 2 + 2 * (L - 1) / L  # the signals and one mask, on a quarter of the rows
    assert passes(LevelSwitch(generations=0, initial=1)) == pytest.approx(quick + end)
    more = passes(LevelSwitch(generations=4, initial=1))
    assert more is not None
    assert quick + end < more < quick + end + L * (rows - 2 + rows)


@pytest.mark.parametrize("kind", [LevelSwitch, SegmentEvolution])
def test_the_answer_hangs_on_the_seed_alone_and_is_in_the_checkpoint(kind: type[MaskPolicy]) -> None:
    one, again, fresh = kind(seed=4), kind(seed=4), kind()
    first, _ = made(one, layers=16, remove=4), random.random()  # the global generator does not matter
    assert made(again, layers=16, remove=4).asked == first.asked
    assert made(kind(seed=5), layers=16, remove=4).asked != first.asked
    fresh.setup(16, 4)
    fresh.load_state_dict(one.state_dict())
    assert fresh.harden() == one.harden() == again.harden()
    gates = one.sample(7, 1)
    assert torch.equal(gates, one.gates(one.harden()))
    one.surrogate(gates[None], torch.ones(1), None).backward()
    assert not one.logits.grad.any()  # type: ignore[union-attr]
    assert not one.needs_gradient
