"""A run goes on with more or fewer ranks: the same rows, each once, in the same order."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from src.cache import CachedCorpus
from src.cache.loader import CachedLoader
from src.data import Corpus
from src.data.loader import Loader
from src.data.redistribute import redistribute
from src.errors import ConfigError
from tests.cached import workspace
from tests.data_tools import corpus, numbered, texts, write_rows


def ranks(data: Corpus, world: int, positions: list[Any] | None = None, **keys: Any) -> list[Loader]:
    places = positions or [None] * world
    return [data.loader("train", True, rank=r, world=world, position=places[r], **keys) for r in range(world)]


def steps(loaders: list[Loader], count: int | None = None) -> list[list[Any]]:
    """The batches of each step, by rank, until no rank has any, or ``count`` of them."""
    given = []
    for batches in itertools.islice(itertools.zip_longest(*loaders), count):
        for loader, batch in zip(loaders, batches, strict=True):
            if batch is not None:
                loader.handed()
        given.append([batch for batch in batches if batch is not None])
    return given


def ids(given: list[list[Any]]) -> list[Any]:
    return [batch["input_ids"].tolist() for step in given for batch in step]


@pytest.mark.parametrize("workers", [0, 4])
@pytest.mark.parametrize(("before", "after", "done"), [(2, 1, 5), (1, 2, 6), (1, 4, 4), (4, 2, 3), (3, 1, 4)])
def test_the_global_order_goes_on(tmp_path: Path, before: int, after: int, done: int, workers: int) -> None:
    """A few steps, then more on other ranks: the sequence of rows is that of one set of ranks."""
    data = corpus(tmp_path, write_rows(tmp_path / "a.jsonl", numbered(400)), batch_size=2)
    whole = ids(steps(ranks(data, before), done + 8))
    loaders = ranks(data, before)
    first = steps(loaders, done)
    places = redistribute([loader.position for loader in loaders], after)
    assert len({len(place["lanes"]) for place in places}) == 1
    rest = steps(ranks(data, after, places, workers=workers), 8 * before // after)
    both = ids(first) + ids(rest)
    assert both == whole[: len(both)]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 8), (3, 2), (3, 6)])
@pytest.mark.parametrize("done", [1, 3, 9, 12])
def test_every_document_of_the_epoch_once(tmp_path: Path, before: int, after: int, done: int) -> None:
    """Also where some lanes have ended, and where the place lies between two steps of more ranks."""
    rows = numbered(90)
    data = corpus(tmp_path, write_rows(tmp_path / "a.jsonl", rows), batch_size=2)
    loaders = ranks(data, before)
    seen = texts(data, [batch for step in steps(loaders, done) for batch in step])
    places = redistribute([loader.position for loader in loaders], after)
    if all(place["epoch"] == 0 for place in places):
        seen += texts(data, [batch for step in steps(ranks(data, after, places)) for batch in step])
    assert sorted(seen) == sorted(row["text"] for row in rows)


def test_the_next_epoch_has_every_document_and_counts_go_on(tmp_path: Path) -> None:
    rows = numbered(60)
    data = corpus(tmp_path, write_rows(tmp_path / "a.jsonl", rows), batch_size=4)
    loaders = ranks(data, 2)
    steps(loaders, 3)
    documents = sum(loader.statistics.documents for loader in loaders)
    (alone,) = ranks(data, 1, redistribute([loader.position for loader in loaders], 1))
    assert alone.statistics.documents == documents
    steps([alone])
    assert alone.statistics.documents == len(rows)
    assert alone.position["epoch"] == 1
    assert sorted(texts(data, [batch for (batch,) in steps([alone])])) == sorted(row["text"] for row in rows)


def test_shares_that_cannot_be_divided_are_refused(tmp_path: Path) -> None:
    data = corpus(tmp_path, write_rows(tmp_path / "a.jsonl", numbered(60)))
    with pytest.raises(ConfigError, match="1, 2, 4 or 8 devices"):
        redistribute([loader.position for loader in ranks(data, 2)], 3)


def test_a_cache_goes_on_too(tmp_path: Path) -> None:
    """Two ranks stop after k batches each; one rank goes on with the rows that are left, and only those."""
    ws = workspace(tmp_path)
    made = CachedCorpus(tokenizer=ws.model, train=ws.write("cache"), batch_size=5)

    def loader(rank: int, world: int) -> CachedLoader:
        return CachedLoader(made.train_cache, 5, 0, 0, True, rank, world)

    def rows(batches: list[dict[str, torch.Tensor]]) -> list[Any]:
        return [row for batch in batches for row in batch["input_ids"].tolist()]

    whole = rows(list(loader(0, 1)))
    for k in range(1, len(loader(0, 2))):
        pair = [loader(rank, 2) for rank in (0, 1)]
        seen = [rows(list(itertools.islice(one, k))) for one in pair]
        alone = loader(0, 1)
        alone.load_state_dict(pair[0].state_dict())
        rest = rows(list(alone))
        everything = {str([i for i in row if i]) for row in [*seen[0], *seen[1], *rest]}
        assert everything == {str([i for i in row if i]) for row in whole}
        assert len(rest) <= len(whole) - len(seen[0]) - len(seen[1]) + 5  # a shard's last batch is shared
