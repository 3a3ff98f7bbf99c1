"""Laws of a loss as a sum of terms, and of the hidden-state term: formula, zero, and what changes nothing."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from src.data.batches import Supervised, supervised
from src.errors import ConfigError
from src.losses import CrossEntropy, Distillation, HiddenStates, Weighted
from src.losses.hidden_states import direction_error
from src.mask import Mask
from src.models.cut import cut
from src.models.streams import streams
from src.recover import Recovery
from tests.tiny import FAMILIES, LAYERS, problem_rows, tiny_ids, tiny_model

Batch = dict[str, Tensor]


@pytest.fixture(scope="module")
def rows() -> Batch:
    return problem_rows(5, prompt=3)


def recovery(mask: str, *terms: Weighted, **keys: Any) -> Recovery:
    """A recovery whose models are loaded and whose teacher is ready."""
    made = Recovery(mask, terms=list(terms) or None, **keys)
    made.configure_model()
    made.teacher.setup(made)
    return made


def graded(made: Recovery, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Value and gradient of the loss on a batch."""
    made.zero_grad()
    value = made.losses(Supervised.of(batch))["loss"]
    value.backward()
    return value.detach(), {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}


def close(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=1e-7)
    assert one[1].keys() == other[1].keys()
    for name, grad in one[1].items():
        torch.testing.assert_close(grad, other[1][name], rtol=1e-4, atol=1e-6)


def alone() -> Weighted:
    return Weighted(HiddenStates())


# ---------------------------------------------------------------- the hidden-state term


def test_it_is_its_formula(mask_file: str, rows: Batch) -> None:
    """Layer by layer, from the states that transformers itself returns."""
    made, keep = recovery(mask_file, alone()), [0, 2, 3, 5]
    index = supervised(rows["labels"])
    inputs = {key: rows[key] for key in ("input_ids", "attention_mask")}
    (parent,) = made.teacher._model  # type: ignore[attr-defined]
    expected = torch.zeros(())
    for position, (_, reader) in enumerate(itertools.pairwise(keep)):
        own = made.model(**inputs, output_hidden_states=True).hidden_states[position + 1]
        target = parent(**inputs, output_hidden_states=True).hidden_states[reader]  # what enters the reader
        own_NH, target_NH = own.flatten(0, 1)[index], target.flatten(0, 1)[index]
        expected += ((own_NH - target_NH).pow(2).mean(-1) / target_NH.pow(2).mean(-1)).mean()
    last = {}
    for model in (made.model, parent):
        norm = model.model.norm
        hook = norm.register_forward_pre_hook(lambda _, given: last.setdefault("x", given[0]))
        model(**inputs)
        hook.remove()
        last[id(model)] = last.pop("x").flatten(0, 1)[index]
    own_NH, target_NH = last[id(made.model)], last[id(parent)]
    expected += ((own_NH - target_NH).pow(2).mean(-1) / target_NH.pow(2).mean(-1)).mean()
    torch.testing.assert_close(made.losses(Supervised.of(rows))["loss"], expected, rtol=1e-5, atol=1e-6)
    assert expected > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_zero_where_student_and_parent_are_one(family: str) -> None:
    """Nothing removed: every stream equals its target to the last bit, in every family."""
    parent, ids = tiny_model(family), tiny_ids()
    mask = Mask("m", LAYERS, tuple(range(LAYERS)), "x")
    student = cut(parent, mask)
    pairs = HiddenStates().pairs(mask)
    assert pairs == tuple((i, i) for i in range(LAYERS))
    with streams(parent, range(LAYERS)) as theirs, streams(student, range(LAYERS)) as own:
        parent(ids)
        student(ids)
    assert theirs.keys() == own.keys() == set(range(LAYERS))
    assert all(torch.equal(own[a], theirs[b]) for a, b in pairs)
    assert len({float(h.detach().sum()) for h in own.values()}) == LAYERS, "each is a stream of its own"


@pytest.mark.parametrize(
    ("layers", "pairs"),
    [
        ("all", ((0, 1), (1, 2), (2, 4), (3, 5))),  # keep 0 2 3 5 of 6: before 1, 2, 4 and the norm
        ("gaps", ((0, 1), (2, 4))),
        ([2, -1], ((1, 2), (3, 5))),
    ],
)
def test_targets_lie_behind_the_gaps(layers: Any, pairs: Any, mask_file: str) -> None:
    assert HiddenStates(layers).pairs(Mask.load(mask_file)) == pairs


def test_a_removed_tail_is_a_gap() -> None:
    assert HiddenStates("gaps").pairs(Mask("m", 6, (0, 1, 2), "x")) == ((2, 5),)


def test_padding_and_packing_change_nothing(mask_file: str, rows: Batch) -> None:
    made = recovery(mask_file, alone(), Weighted(Distillation(weight="none"), 0.5))
    whole = graded(made, rows)
    filled = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    padded = {k: torch.nn.functional.pad(v, (0, 7), value=filled[k]) for k, v in rows.items()}
    close(whole, graded(made, padded))
    lengths = rows["attention_mask"].sum(1).tolist()
    packed = {
        key: torch.cat([row[:n] for row, n in zip(rows[key], lengths, strict=True)])[None]
        for key in ("input_ids", "labels")
    }
    starts = [0, *itertools.accumulate(lengths)][:-1]
    packed["labels"][0, starts] = -100
    packed["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    close(whole, graded(made, packed))


def test_micro_batches_change_nothing(mask_file: str, rows: Batch) -> None:
    """Weighed by their positions, as :class:`src.training.ranks.MicroBatches` does."""
    made = recovery(mask_file, alone(), distillation=Distillation(weight="none"))
    value, grads = graded(made, rows)
    counts = [len(supervised(rows["labels"][at])) for at in (slice(0, 2), slice(2, 5))]
    parts = [graded(made, {k: v[at] for k, v in rows.items()}) for at in (slice(0, 2), slice(2, 5))]
    shares = [n / sum(counts) for n in counts]
    total = sum(share * part[0] for share, part in zip(shares, parts, strict=True))
    summed = {
        name: sum(share * part[1][name] for share, part in zip(shares, parts, strict=True)) for name in grads
    }
    close((value, grads), (total, summed))


def test_recomputed_activations_change_nothing(mask_file: str, rows: Batch) -> None:
    plain, again = (recovery(mask_file, alone(), checkpoint_activations=on) for on in (False, True))
    one, other = graded(plain, rows), graded(again, rows)
    assert torch.equal(one[0], other[0])
    close(one, other)


def test_no_supervised_position_gives_zero_not_nan(mask_file: str, rows: Batch) -> None:
    made = recovery(mask_file, alone())
    value, grads = graded(made, {**rows, "labels": torch.full_like(rows["labels"], -100)})
    assert value == 0
    assert all((grad == 0).all() for grad in grads.values())


# ---------------------------------------------------------------- the sum


def test_the_sum_is_the_weighted_sum_in_value_and_gradient(mask_file: str, rows: Batch) -> None:
    terms = [Weighted(Distillation(), 0.5), Weighted(CrossEntropy(chunk_tokens=7), 2.0), alone()]
    value, grads = graded(recovery(mask_file, *terms), rows)
    parts = [graded(recovery(mask_file, Weighted(each.term)), rows) for each in terms]
    weights = [each.weight for each in terms]
    total = sum(w * part[0] for w, part in zip(weights, parts, strict=True))
    summed = {
        name: sum(w * part[1].get(name, 0.0) for w, part in zip(weights, parts, strict=True))
        for name in grads
    }
    close((value, grads), (total, summed))


def test_a_term_counts_until_its_time_is_over_and_costs_nothing_then(mask_file: str, rows: Batch) -> None:
    """Before, the loss is that of a term without an end; after, that without the term: to the last bit."""
    made = recovery(mask_file, Weighted(HiddenStates(), 10.0, until=0.5), distillation=Distillation())
    for done, terms in (
        (0.0, [Weighted(HiddenStates(), 10.0)]),
        (0.499, [Weighted(HiddenStates(), 10.0)]),
        (0.5, []),
    ):
        made.done = done
        value, grads = graded(made, rows)
        other = graded(recovery(mask_file, *terms, distillation=Distillation()), rows)
        assert torch.equal(value, other[0])
        assert all(torch.equal(grad, other[1][name]) for name, grad in grads.items())
    assert made.objective.at(0.5).pairs(made.mask) == ()
    assert made.objective.timed
    assert not recovery(mask_file, alone()).objective.timed


def test_directions_are_compared_whatever_the_lengths(mask_file: str, rows: Batch) -> None:
    """The error is that of streams of length 1, and no factor on either stream changes it."""
    torch.manual_seed(0)
    own, target = torch.randn(2, 6, 8)
    unit = [x / x.norm(dim=-1, keepdim=True) for x in (own, target)]
    measured = direction_error(own, target)
    torch.testing.assert_close(measured, (unit[0] - unit[1]).square().sum())
    torch.testing.assert_close(direction_error(3 * own, 0.1 * target), measured)
    assert direction_error(own, 2 * own).abs() < 1e-5
    value, _ = graded(recovery(mask_file, Weighted(HiddenStates(error="direction"))), rows)
    assert 0 < value < 4 * LAYERS, "at most 4 for each layer"


def test_cross_entropy_is_the_models_own_loss(mask_file: str, rows: Batch) -> None:
    made = recovery(mask_file, Weighted(CrossEntropy(chunk_tokens=5)))
    value, grads = graded(made, rows)
    made.zero_grad()
    theirs = made.model(**rows).loss
    theirs.backward()
    close((value, grads), (theirs.detach(), {n: p.grad for n, p in made.named_parameters()}))


def test_distillation_alone_is_the_loss_of_before(mask_file: str, rows: Batch) -> None:
    """The shorthand, the default and the only term are one: to the last bit."""
    ways = [
        recovery(mask_file, distillation=Distillation()),
        recovery(mask_file),
        recovery(mask_file, Weighted(Distillation())),
    ]
    (value, grads), *others = [graded(made, rows) for made in ways]
    for other in others:
        assert torch.equal(value, other[0])
        assert all(torch.equal(grad, other[1][name]) for name, grad in grads.items())


def test_validation_and_cache_ask_the_one_distillation(mask_file: str) -> None:
    own = Distillation(k=3, rule="renormalise")
    assert Recovery(mask_file, terms=[alone(), Weighted(own, 0.1)]).distillation is own
    assert Recovery(mask_file, terms=[alone()], distillation=own).distillation is own
    assert Recovery(mask_file, terms=[alone()]).distillation.k == 10


def test_something_counts_until_the_end(mask_file: str) -> None:
    ended = Weighted(HiddenStates(), until=0.5)
    for terms in ([ended], [ended, Weighted(Distillation(), 0.0)]):
        with pytest.raises(ConfigError, match="none with a weight above 0 reaches all weights until the end"):
            Recovery(mask_file, terms=terms)
    with pytest.raises(ConfigError, match=r"until: 0.5 given to CrossEntropy, without which some weights"):
        Weighted(CrossEntropy(), until=0.5)
    with pytest.raises(ConfigError, match=r"terms: until: 1.5 given; accepted: a number from 0 to 1"):
        Weighted(HiddenStates(), 1.0, 1.5)


@pytest.mark.parametrize("weight", [float("inf"), float("nan"), -0.5])
def test_a_weight_is_a_finite_number_from_zero(weight: float) -> None:
    with pytest.raises(ConfigError, match=rf"terms: weight: {weight} given; accepted: a number from 0"):
        Weighted(HiddenStates(), weight)
