"""Batches hold what the rows say: positions that predict, tokens that are real, names of rows, counts."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from src.data.batches import (
    Batch,
    Packed,
    Padded,
    Supervised,
    name_of,
    real,
    real_tokens,
    row_ids,
    supervised,
)
from src.data.encode import IGNORE, TokenRow
from src.data.statistics import Statistics

SIZE = 16
LENGTHS = st.lists(st.integers(2, SIZE), min_size=1, max_size=12)
few = settings(max_examples=40, deadline=None)


def documents(lengths: list[int], seed: int = 0) -> list[TokenRow]:
    """Documents of these lengths; some tokens are not supervised, the last one always is."""
    rng = random.Random(seed)
    made = list[TokenRow]()
    for n, length in enumerate(lengths):
        ids = [rng.randrange(3, 90) for _ in range(length)]
        labels = [i if rng.random() < 0.6 else IGNORE for i in ids]
        labels[-1] = ids[-1]
        made.append(TokenRow(ids, labels, f"row {n}", lost=n % 3))
    return made


def collated(rows: list[TokenRow], packed: bool, size: int = 3) -> list[tuple[list[list[TokenRow]], Batch]]:
    batching: Any = (Packed if packed else Padded)(size, SIZE, 0)
    return [(batch, batching.collate(batch)) for batch in batching.plan(list(rows), random.Random(1))]


def pairs(row: TokenRow) -> list[tuple[int, int]]:
    """(token, the next one), where the next one is to be predicted."""
    return [(row.ids[t], row.ids[t + 1]) for t in range(len(row.ids) - 1) if row.labels[t + 1] != IGNORE]


@few
@given(LENGTHS, st.booleans())
def test_every_token_with_a_label_is_predicted_from_the_one_before_it_in_its_document(
    lengths: list[int], packed: bool
) -> None:
    rows, found = documents(lengths), list[tuple[int, int]]()
    for _, batch in collated(rows, packed):
        index_N = supervised(batch["labels"], batch.get("position_ids"))
        assert torch.equal(index_N, supervised(batch["labels"])), "labels alone say it"
        whole = Supervised.of(batch)
        assert len(whole) == len(index_N) == len(whole.labels_N)
        found += zip(batch["input_ids"].flatten()[index_N].tolist(), whole.labels_N.tolist(), strict=True)
    assert sorted(found) == sorted(pair for row in rows for pair in pairs(row))


@few
@given(LENGTHS, st.booleans())
def test_real_tokens_are_those_of_the_documents(lengths: list[int], packed: bool) -> None:
    for held, batch in collated(documents(lengths), packed):
        mask_BT = real(batch)
        for row, mask_T, ids_T in zip(held, mask_BT, batch["input_ids"], strict=True):
            ids = [i for document in row for i in document.ids]
            assert ids_T[mask_T].tolist() == ids
            assert mask_T.tolist() == [True] * len(ids) + [False] * (len(mask_T) - len(ids))
        assert real_tokens(batch) == sum(len(d.ids) for row in held for d in row)
        assert (batch["labels"][~mask_BT] == IGNORE).all()


@few
@given(LENGTHS, st.integers(1, 9))
def test_a_padded_row_has_one_name_in_every_batch(lengths: list[int], size: int) -> None:
    rows, names = documents(lengths), dict[tuple[int, ...], int]()
    for held, batch in collated(rows, False, size):
        for (row,), name in zip(held, row_ids(batch), strict=True):
            names[tuple(row.ids)] = name
            assert name == name_of(torch.tensor(row.ids))
    assert len(set(names.values())) == len(names), "and no other row has it"
    for packing in collated(rows, False, 1):
        held, batch = packing
        assert row_ids(batch) == [names[tuple(held[0][0].ids)]]


def test_a_name_is_the_same_on_every_machine_and_for_every_integer_type() -> None:
    ids = torch.tensor([3, 1, 4, 1, 5])
    assert name_of(ids) == name_of(ids.int()) == -1149698772627659508
    assert -(2**63) <= name_of(ids) < 2**63
    assert name_of(ids) != name_of(ids.flip(0))
    assert name_of(ids) != name_of(ids[:-1])


@few
@given(LENGTHS, st.booleans(), st.integers(0, 3))
def test_counts_of_batches_add_up_to_those_of_the_documents(
    lengths: list[int], packed: bool, lost: int
) -> None:
    rows, whole = documents(lengths), Statistics()
    drops = [f"row {n} dropped" for n in range(lost)]
    made = collated(rows, packed)
    for n, (held, batch) in enumerate(made):
        whole += Statistics.of(held, batch, drops if n == 0 else [], {"url"})
    assert (whole.batches, whole.documents, whole.dropped) == (len(made), len(rows), lost)
    assert whole.tokens == sum(lengths)
    assert whole.tokens + whole.padding == sum(batch["input_ids"].numel() for _, batch in made)
    first = sum(row.labels[0] != IGNORE for row in rows) if packed else 0  # predicted by nobody there
    assert whole.supervised == sum(label != IGNORE for row in rows for label in row.labels) - first
    assert (whole.truncated, whole.lost) == (sum(r.lost > 0 for r in rows), sum(r.lost for r in rows))
    assert whole.first_dropped == (drops[0] if drops else "")
    assert whole.unread == ("url",)
    told = whole.numbers()
    assert told["waste"] == pytest.approx(whole.padding / (whole.tokens + whole.padding))
    assert len(whole.fates()) == 1 + bool(lost) + bool(whole.truncated)


def counted(seed: int) -> Statistics:
    rng = random.Random(seed)
    numbers = [rng.randrange(9) for _ in range(9)]
    names = [rng.choice(["", f"a{seed}"]), rng.choice(["", f"b{seed}"])]
    return Statistics(*numbers, *names, tuple(sorted(rng.sample("uvwxyz", 2))))


def test_sums_of_counts_do_not_depend_on_their_grouping() -> None:
    for seed in range(20):
        a, b, c = (counted(3 * seed + n) for n in range(3))
        assert (a + b) + c == a + (b + c)
        assert a + Statistics() == Statistics() + a == a
        assert (a + b).numbers().items() - {"waste": 0}.items() == (b + a).numbers().items() - {
            "waste": 0
        }.items()
        assert (a + b).first_dropped == (a.first_dropped or b.first_dropped), "the first of two places stays"


def test_of_no_batch_only_what_was_left_out_is_counted() -> None:
    assert Statistics.of([], None, ["row 7"]) == Statistics(dropped=1, first_dropped="row 7")
    assert Statistics().numbers()["waste"] == 0.0
    assert Statistics().fates() == set()


@pytest.mark.parametrize("packed", [False, True])
def test_without_a_generator_the_plan_is_one_and_with_one_it_follows_the_seed(packed: bool) -> None:
    batching: Any = (Packed if packed else Padded)(2, SIZE, 0)

    def plan(seed: int | None) -> list[list[list[str]]]:
        rng = None if seed is None else random.Random(seed)
        rows = documents([2 + n % 9 for n in range(30)])
        return [[[d.where for d in row] for row in batch] for batch in batching.plan(rows, rng)]

    assert plan(None) == plan(None)
    assert plan(3) == plan(3) != plan(4)
    assert plan(None) != plan(3)


def labels_of(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


def test_the_ends_of_rows_predict_nothing() -> None:
    """The last token of a row has no next one; the first of the next row is not it."""
    assert supervised(labels_of([5, 6, 7], [8, 9, 1])).tolist() == [0, 1, 3, 4]
    assert supervised(labels_of([5, IGNORE, 7], [8, IGNORE, IGNORE])).tolist() == [1]
    assert supervised(labels_of([5], [6])).tolist() == []
