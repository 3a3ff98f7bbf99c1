"""A document is counted once: however often, in whichever batch, rank or stage it is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from src.data import distinct
from src.data.batches import Batch, Packed, Padded
from src.data.distinct import Distinct
from src.data.encode import TokenRow

DOCUMENTS = [[n, *range(n % 5 + 1)] for n in range(1, 41)]
TOKENS = sum(map(len, DOCUMENTS))


def batches(documents: list[list[int]], packed: bool, size: int) -> list[Batch]:
    rows = [TokenRow(ids, ids, "") for ids in documents]
    batching: Any = Packed(size, 16, 0) if packed else Padded(size, 16, 0)
    return [batching.collate(batch) for batch in batching.plan(rows, None)]


def seen(*read: Batch) -> Distinct:
    counted = Distinct()
    for batch in read:
        counted.add(batch)
    return counted


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("times", [1, 3])
def test_repetitions_padding_and_packing_change_no_count(packed: bool, times: int) -> None:
    counted = seen(*batches(DOCUMENTS, packed, 4) * times, *batches(DOCUMENTS[::-1], not packed, 7))
    assert (counted.documents, counted.tokens) == (40, TOKENS)


def test_samples_of_parts_that_overlap_unite_to_that_of_all() -> None:
    parts = [seen(*batches(DOCUMENTS[a:b], False, 4)).sample for a, b in ((0, 25), (15, 40), (5, 9))]
    assert Distinct().unite(parts).tokens == TOKENS
    assert torch.equal(
        Distinct().unite(parts).sample.sort(0).values,
        seen(*batches(DOCUMENTS, True, 3)).sample.sort(0).values,
    )


def test_beyond_the_sample_the_number_is_estimated_without_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distinct, "KEPT", 400)
    documents = [[n // 256, n % 256, 7] for n in range(6000)]
    counted = seen(*batches(documents, False, 500) * 2)
    assert len(counted.sample) == 400
    assert abs(counted.documents / 6000 - 1) < 4 / 400**0.5  # four standard deviations
    assert counted.tokens == pytest.approx(3 * counted.documents, abs=2)


def test_what_was_read_before_a_resume_is_not_counted_again() -> None:
    half = seen(*batches(DOCUMENTS[:20], False, 4))
    resumed = seen(*batches(DOCUMENTS[10:30], False, 4)).unite([half.sample])
    assert (resumed.documents, resumed.tokens) == (30, sum(map(len, DOCUMENTS[:30])))
