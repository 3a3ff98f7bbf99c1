"""What a mask of halves means behind the cut: gaps, what reads them, what trains and is repaired beside them.

Over every legal mask of a small model, the properties of a mask are those of its definition, walked through
half by half. In a parent whose removed halves write nothing, removing them changes no logit and no stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from src.errors import ConfigError
from src.losses import HiddenStates
from src.losses.hidden_states import relative_error
from src.mask import Mask
from src.models.cut import cut
from src.models.layers import decoder_layers
from src.models.streams import streams
from src.policies import SLEB, Exhaustive, GumbelTopK, LayerKL, RandomSearch
from src.policies.measuring import Probe
from src.policies.polish import polish
from src.repair.stream import junctions
from src.training.scopes import cut_adjacent
from src.units.alternating import Alternating
from src.units.halves import find_halves
from tests.tiny import LAYERS, tiny_ids, tiny_model

KEEP = (0, 1, 2, 3, 4, 7, 8, 9, 12, 13)
"""Attention of layers 0, 1, 2, 4, 6 and feed-forward of 0, 1, 3, 4, 6."""
FAMILIES = ["llama", "gpt2", "gemma2", "olmo2", "bloom", "opt", "phi3"]


def half_mask(keep: tuple[int, ...], layers: int = LAYERS) -> Mask:
    return Mask("m", layers, keep, "by hand", unit="half")


def masks(layers: int) -> Iterator[Mask]:
    for depth in range(1, layers + 1):
        for keep in Alternating(2 * layers, 2 * depth):
            yield half_mask(keep, layers)


# ---------------------------------------------------------------- the definition, over every small mask


@pytest.mark.parametrize("mask", masks(4), ids=str)
def test_gaps_are_where_something_is_missing_between_two_new_layers(mask: Mask) -> None:
    units = list(mask.keep)
    ends = [at for at, unit in enumerate(units) if unit % 2][:-1]
    missing = {position for position, at in enumerate(ends) if units[at + 1] != units[at] + 1}
    assert set(mask.gaps) == missing
    for position, at in enumerate(ends):
        assert mask.reads[position] == units[at + 1] // 2, "the next attention reads"
    assert mask.reads[-1] == mask.num_layers


@pytest.mark.parametrize("mask", masks(4), ids=str)
def test_blocks_beside_a_cut_are_those_with_a_missing_half_before_inside_or_behind(mask: Mask) -> None:
    halves = [-1, *mask.keep, mask.units]
    near = set()
    for at, (before, after) in enumerate(pairwise(halves)):
        if after != before + 1:
            near |= {(at - 1) // 2, at // 2}
    assert cut_adjacent(mask) == near & set(range(mask.depth))


@pytest.mark.parametrize("mask", masks(4), ids=str)
def test_words_and_counts_agree_with_the_sets(mask: Mask) -> None:
    assert len(mask.keep) == 2 * mask.depth
    assert len(mask.keep) + len(mask.removed) == mask.units
    assert mask.recombines is any(a != f for a, f in zip(mask.attention, mask.feed_forward, strict=True))
    assert str(mask).count("#") == len({*mask.attention} & {*mask.feed_forward})
    assert str(mask).partition("]")[0].count("a") == len({*mask.attention} - {*mask.feed_forward})
    for place in junctions(mask):
        assert mask.feed_forward[place.before] + 1 == place.start < place.end == mask.reads[place.before]


def test_whole_layers_are_the_masks_that_do_not_recombine() -> None:
    for mask in masks(5):
        if not mask.recombines:
            layers = Mask("m", 5, mask.attention, "by hand")
            assert (mask.gaps, mask.reads) == (layers.gaps, layers.reads)
            assert cut_adjacent(mask) == cut_adjacent(layers)
            assert junctions(mask) == junctions(layers)
            assert HiddenStates().pairs(mask) == HiddenStates().pairs(layers)


def test_only_layers_whose_output_is_kept_learn_hidden_states() -> None:
    mask = half_mask(KEEP)
    assert HiddenStates().pairs(mask) == ((0, 0), (1, 1), (2, 3), (3, 5), (4, 6))
    assert HiddenStates("gaps").pairs(mask) == ((3, 5),)
    assert HiddenStates([3, -1]).pairs(mask) == ((2, 3), (4, 6))
    with pytest.raises(ConfigError, match=r"some of \[0, 1, 3, 4, 6\]"):
        HiddenStates([2]).pairs(mask)  # only its attention is kept


# ---------------------------------------------------------------- halves that write nothing


def silent(model: PreTrainedModel, mask: Mask) -> PreTrainedModel:
    """The model with everything that the removed halves would write set to zero."""
    layers = decoder_layers(model)[1]
    for unit in mask.removed:
        halves = find_halves(model)[unit // 2]
        for name, weight in layers[unit // 2].named_parameters():
            if halves.of(name) == unit % 2:
                weight.data.zero_()
    return model


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_removing_what_writes_nothing_changes_no_logit_and_no_stream(family: str) -> None:
    mask, ids = half_mask(KEEP), tiny_ids()
    parent = tiny_model(family)
    if family == "gemma2":  # its norms add one to their weights: only the maps are silenced
        for unit in mask.removed:
            halves, layer = find_halves(parent)[unit // 2], decoder_layers(parent)[1][unit // 2]
            for name, weight in layer.named_parameters():
                if halves.of(name) == unit % 2 and "norm" not in name:
                    weight.data.zero_()
    else:
        parent = silent(parent, mask)
    student = cut(parent, mask)
    pairs = HiddenStates().pairs(mask)
    with streams(parent, [theirs for _, theirs in pairs]) as wanted:
        whole = parent(input_ids=ids, use_cache=False).logits
    with streams(student, [own for own, _ in pairs]) as given:
        short = student(input_ids=ids, use_cache=False).logits
    assert torch.equal(short, whole)
    for own, theirs in pairs:
        assert float(relative_error(given[own].flatten(0, 1), wanted[theirs].flatten(0, 1))) == 0.0


# ---------------------------------------------------------------- choosing


class Table(Probe):
    """A probe whose divergence is a sum of costs, with a bonus where two given halves go together."""

    def __init__(self, cost_U: Tensor, pair: tuple[int, int], bonus: float) -> None:
        self.cost_U, self.pair, self.bonus, self.measured = cost_U, pair, bonus, 0

    def divergence(self, gates_U: Tensor, quick: bool = False) -> float:
        self.measured += 1
        together = all(gates_U[unit] == 0 for unit in self.pair)
        return float((self.cost_U * (1 - gates_U)).sum()) - self.bonus * together

    cross_entropy = divergence


COST = torch.tensor([9.0, 5.0, 1.0, 6.0, 7.0, 2.0, 3.0, 8.0, 2.5, 4.0, 9.0, 9.0])


def best(table: Table, space: Alternating) -> tuple[int, ...]:
    gates = {kept: torch.zeros(12).index_fill(0, torch.tensor(kept), 1.0) for kept in space}
    return min(gates, key=lambda kept: table.divergence(gates[kept]))


@pytest.mark.parametrize("bonus", [0.0, 4.0])
def test_the_exhaustive_policy_finds_the_best_recombined_cut(bonus: float) -> None:
    table = Table(COST, (4, 7), bonus)
    policy = Exhaustive()
    policy.setup(6, 2, unit="half")
    policy.initialise(table)
    assert policy.harden() == best(table, policy.space)


def test_the_kl_of_each_half_alone_finds_the_best_set_of_a_sum() -> None:
    """Without interactions the scores are the costs, and the best legal set is a walk through the table."""
    table = Table(COST, (0, 1), 0.0)
    for policy in (LayerKL(), GumbelTopK(init="kl")):
        policy.setup(6, 2, unit="half")
        policy.initialise(table)
        if isinstance(policy, LayerKL):
            assert policy.harden() == best(table, policy.space)
        assert policy.space.legal(policy.harden())
    whole = LayerKL()
    whole.setup(6, 2)
    whole.initialise(Table(COST[::2] + COST[1::2], (0, 1), 0.0))
    gone = {*range(6)} - {*whole.harden()}
    recombined = best(table, policy.space)
    cheaper = sum(float(COST[u]) for u in {*range(12)} - {*recombined})
    assert cheaper < sum(float(COST[2 * i] + COST[2 * i + 1]) for i in gone), "halves are the larger space"


def test_polish_ends_where_no_neighbour_is_better() -> None:
    space = Alternating(12, 8)
    for seed in range(5):
        start = space.uniform(torch.Generator().manual_seed(seed))
        table = Table(COST, (4, 7), 4.0)

        def measure(
            masks: Sequence[tuple[int, ...]], quick: bool = False, table: Table = table
        ) -> list[float]:
            return table.walk([torch.zeros(12).index_fill(0, torch.tensor(kept), 1.0) for kept in masks], "")

        end = polish(start, space, measure, swaps=1000, finalists=1000)
        assert space.legal(end)
        assert measure([end])[0] <= min(measure([start, *space.neighbours(end)]))


def test_a_greedy_walk_removes_one_pair_a_round_and_measures_all_of_them() -> None:
    table = Table(COST, (0, 1), 0.0)
    policy = SLEB(measure="divergence", always_keep=[])
    policy.setup(6, 2, unit="half")
    policy.initialise(table)
    assert table.measured == 11 + 9  # pairs of neighbours among 12 and among 10 halves
    assert policy.space.legal(policy.harden())
    rounds = policy.logits.tolist()
    assert sorted(rounds) == [0.0, 0.0, 1.0, 1.0, *[2.0] * 8]


def test_a_start_that_compares_whole_layers_is_refused_for_halves() -> None:
    with pytest.raises(ConfigError, match=r"policy\.init: 'block_influence'"):
        GumbelTopK(init="block_influence").setup(6, 2, unit="half")


def test_random_masks_are_legal_and_differ_by_the_seed() -> None:
    drawn = []
    for seed in range(3):
        policy = RandomSearch(masks=20, seed=seed)
        policy.setup(6, 2, unit="half")
        drawn.append(policy.draws())
        assert all(policy.space.legal(kept) for kept in drawn[-1])
    assert drawn[0] != drawn[1] != drawn[2]
