"""A source of so many rows: every epoch, rank, batch and resume sees the first rows and no others."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.data import Corpus
from src.data.loader import Loader
from src.errors import ConfigError
from tests.data_tools import corpus, numbered, texts, write_rows


def limited(folder: Path, count: int, rows: int, files: int = 1, **options: Any) -> Corpus:
    """A corpus of some numbered rows in some files, of which the first are read."""
    every = numbered(count)
    size = -(-count // files)
    for number in range(files):
        if part := every[number * size : (number + 1) * size]:
            write_rows(folder / f"{number}.jsonl", part)
    return corpus(folder, [{"path": str(folder / "*.jsonl"), "rows": rows}], **options)


def first(count: int, rows: int) -> list[str]:
    return sorted(row["text"] for row in numbered(count)[:rows])


@pytest.mark.parametrize("packing", ["padded", "documents"])
@settings(max_examples=12, deadline=None)
@given(
    count=st.integers(1, 60), rows=st.integers(1, 80), files=st.integers(1, 3), world=st.integers(1, 3),
)  # fmt: skip
def test_ranks_together_see_the_first_rows_once_an_epoch(
    tmp_path_factory: pytest.TempPathFactory, packing: str, count: int, rows: int, files: int, world: int
) -> None:
    folder = tmp_path_factory.mktemp("corpus")
    data = limited(folder, count, rows, files, packing=packing)
    seen = []
    for rank in range(world):
        with suppress(ConfigError):  # of a rank for which there is no row
            seen += texts(data, data.loader("train", shuffle=True, rank=rank, world=world))
    assert sorted(seen) == first(count, rows)


def epochs(loader: Loader, data: Corpus, count: int) -> list[list[str]]:
    """The documents of so many epochs in a row."""
    found = []
    for _ in range(count):
        batches = []
        for batch in loader:
            batches.append(batch)
            loader.handed()
        found.append(texts(data, batches))
    return found


def test_every_epoch_reads_the_same_rows_in_another_order(tmp_path: Path) -> None:
    data = limited(tmp_path, 100, 40)
    read = epochs(data.loader("train", shuffle=True), data, 4)
    assert [sorted(epoch) for epoch in read] == [first(100, 40)] * 4
    assert len({tuple(epoch) for epoch in read}) > 1


@pytest.mark.parametrize("stopped", [1, 2, 3])
def test_a_resume_goes_on_within_the_first_rows(tmp_path: Path, stopped: int) -> None:
    data = limited(tmp_path, 50, 12, batch_size=3)
    (whole,) = epochs(data.loader("train", shuffle=True), data, 1)
    loader, before = data.loader("train", shuffle=True), []
    for number, batch in enumerate(loader, start=1):
        before.append(batch)
        loader.handed()
        if number == stopped:
            break
    again = data.loader("train", shuffle=True, position=loader.position)
    assert texts(data, before) + epochs(again, data, 1)[0] == whole


def test_a_weighted_part_starts_again_from_its_first_row(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "rows.jsonl", numbered(30, start=100 * (name == "two")))
    parts = [
        {"path": str(tmp_path / "one" / "rows.jsonl"), "weight": 1, "rows": 8},
        {"path": str(tmp_path / "two" / "rows.jsonl"), "weight": 1},
    ]
    data = corpus(tmp_path, parts)
    read = texts(data, data.loader("train", shuffle=False))
    small = [text for text in read if int(text.partition(":")[0]) < 100]
    assert {text.partition(":")[0] for text in small} == set("01234567")
    assert abs(len(small) - len(read) / 2) <= 4  # one of each of the four lanes


@pytest.mark.parametrize("rows", [0, -3, 1.5, "many", True])
def test_a_number_of_rows_that_is_none_is_refused(tmp_path: Path, rows: Any) -> None:
    path = write_rows(tmp_path / "a.jsonl", numbered(3))
    with pytest.raises(ConfigError, match=r"data\.train: .* has rows .*; accepted: a whole number above 0"):
        corpus(tmp_path, [{"path": path, "rows": rows}])


def test_another_number_of_rows_is_another_order_and_an_old_note_is_all_of_them(tmp_path: Path) -> None:
    from src.data.content import alike, described

    some, other, every = (limited(tmp_path, 9, rows) for rows in (4, 5, 9))
    every.train = [type(part)(part.path) for part in every.train]
    notes = [described(data.train) for data in (some, other, every)]
    assert not alike(notes[0], notes[1])
    assert not alike(notes[0], notes[2])
    old = [{key: value for key, value in part.items() if key != "rows"} for part in notes[2]]
    assert alike(old, notes[2])
    assert not alike(old, notes[0])
