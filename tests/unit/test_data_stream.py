"""The stream: every document exactly once, one order whatever the hands, and nothing lost unseen."""

from __future__ import annotations

import contextlib
import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.data import real_tokens, row_ids
from src.data.loader import Loader
from src.errors import ConfigError
from tests.data_tools import corpus, numbered, texts, write_rows


def rows_of(loader: Loader) -> list[list[list[int]]]:
    return [batch["input_ids"].tolist() for batch in loader]


@pytest.mark.parametrize("packing", ["padded", "documents"])
@settings(max_examples=12, deadline=None)
@given(count=st.integers(1, 150), world=st.integers(1, 3), files=st.integers(1, 4), buffer=st.integers(1, 64))
def test_every_document_once_over_ranks(tmp_path_factory, packing, count, world, files, buffer):
    folder = tmp_path_factory.mktemp("corpus")
    rows = numbered(count)
    paths = [write_rows(folder / f"{i}.jsonl", rows[i::files]) for i in range(files) if rows[i::files]]
    data = corpus(folder, paths, shuffle_buffer=buffer, packing=packing)
    seen = []
    for rank in range(world):
        loader = data.loader("train", shuffle=True, rank=rank, world=world)
        with contextlib.suppress(ConfigError):  # a rank without any document says so
            seen += texts(data, loader)
    assert sorted(seen) == sorted(row["text"] for row in rows)


@pytest.mark.parametrize("packing", ["padded", "documents"])
def test_workers_change_nothing(tmp_path, packing):
    data = corpus(tmp_path, write_rows(tmp_path / "a.jsonl", numbered(150)), packing=packing)
    orders = [
        [rows_of(data.loader("train", shuffle=True, rank=rank, world=2, workers=workers)) for rank in (0, 1)]
        for workers in (0, 1, 2, 4)
    ]
    assert all(order == orders[0] for order in orders)


def test_workers_leave_every_document_in_place(tmp_path):
    data = corpus(tmp_path, write_rows(tmp_path / "a.jsonl", numbered(90)))
    seen = []
    for rank in range(2):
        seen += texts(data, data.loader("train", shuffle=True, rank=rank, world=2, workers=2))
    assert sorted(seen) == sorted(row["text"] for row in numbered(90))


def test_order_follows_seed_and_epoch(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", numbered(100))

    def epochs(seed: int) -> list[list[list[list[int]]]]:
        loader, found = corpus(tmp_path, path, seed=seed).loader("train", shuffle=True), []
        for _ in range(2):
            found.append([])
            for batch in loader:
                found[-1].append(batch["input_ids"].tolist())
                loader.handed()
        return found

    first, again, other = epochs(0), epochs(0), epochs(1)
    assert first == again
    assert first[0] != first[1]
    assert first[0] != other[0]
    assert sorted(r for b in first[0] for r in map(str, b)) != []


def test_the_global_generator_is_left_alone(tmp_path):
    data = corpus(tmp_path, write_rows(tmp_path / "a.jsonl", numbered(20)))
    before = torch.get_rng_state()
    rows_of(data.train_dataloader())
    assert torch.equal(before, torch.get_rng_state())


def test_similar_lengths_leave_little_padding(tmp_path):
    rows = [{"text": "x" * (i % 60 + 1)} for i in range(960)]
    data = corpus(tmp_path, write_rows(tmp_path / "a.jsonl", rows), batch_size=8, shuffle_buffer=960)
    loader = data.loader("train", shuffle=True)
    for _ in loader:
        loader.handed()
    lengths = [len(row["text"]) + 1 for row in rows]
    random.Random(0).shuffle(lengths)
    groups = [lengths[i : i + 8] for i in range(0, 960, 8)]
    blind = 1 - sum(lengths) / sum(8 * max(group) for group in groups)
    assert loader.statistics.numbers()["waste"] < blind / 4


def test_statistics_add_up_and_name_what_is_not_whole(tmp_path):
    rows = [{"question": "q", "answer": "a" * 10}, {"question": "q" * 80, "answer": "lost"}]
    rows += [{"question": "q", "answer": "b" * 100}]
    data = corpus(tmp_path, write_rows(tmp_path / "a.jsonl", rows), supervise="answer", bos=False)
    loader = data.loader("train", shuffle=True)
    batches = []
    for batch in loader:
        loader.handed()
        batches.append(batch)
    counts = loader.statistics
    assert counts.documents == 2
    assert counts.tokens == sum(map(real_tokens, batches)) == 13 + 64
    assert counts.supervised == sum(int((batch["labels"] != -100).sum()) for batch in batches)
    assert (counts.truncated, counts.lost, counts.dropped) == (1, 2 + 100 + 1 - 64, 1)
    assert counts.first_truncated.endswith("a.jsonl row 3")
    assert counts.first_dropped.endswith("a.jsonl row 2")
    assert len(counts.fates()) == 2


@pytest.mark.parametrize("packing", ["padded", "documents"])
def test_split_keeps_every_token(tmp_path, packing):
    data = corpus(
        tmp_path,
        write_rows(tmp_path / "a.jsonl", [{"text": "abcdefgh" * 40}]),
        too_long="split",
        packing=packing,
    )
    pieces = texts(data, data.loader("train", shuffle=False))
    assert sorted("".join(sorted(pieces))) == sorted("abcdefgh" * 40)
    assert len(pieces) == 6


def test_pieces_without_a_supervised_token_are_counted(tmp_path):
    """A prompt longer than a row leaves whole pieces that teach nothing: left out, but not unseen."""
    rows = [{"question": "q" * 200, "answer": "yes"}, {"question": "q", "answer": "a"}]
    path = write_rows(tmp_path / "a.jsonl", rows)
    loader = corpus(tmp_path, path, supervise="answer", too_long="split", bos=False).loader(
        "train", shuffle=True
    )
    for _ in loader:
        loader.handed()
    counts = loader.statistics
    whole = sum(len(row["question"] + row["answer"]) + 2 for row in rows)
    assert counts.tokens + counts.lost == whole
    assert (counts.truncated, counts.lost, counts.dropped) == (1, 3 * 64, 0)
    assert counts.first_truncated.endswith("a.jsonl row 1")


def test_held_out_sides_are_disjoint_and_complete(tmp_path):
    data = corpus(tmp_path, write_rows(tmp_path / "a.jsonl", numbered(300)), held_out=0.2)
    train, apart = (texts(data, data.loader(s, shuffle=False)) for s in ("train", "validation"))
    assert sorted(train + apart) == sorted(row["text"] for row in numbered(300))
    assert 30 < len(apart) < 90


def test_mixture_keeps_its_proportions_and_reads_every_part(tmp_path):
    from src.data import Source

    a = write_rows(tmp_path / "a.jsonl", numbered(120))
    b = write_rows(tmp_path / "b.jsonl", numbered(20, start=1000))
    data = corpus(tmp_path, [Source(a, weight=3), Source(b, weight=1)])
    seen = texts(data, data.loader("train", shuffle=True))
    small = [text for text in seen if int(text.split(":")[0]) >= 1000]
    assert len(small) / len(seen) == pytest.approx(0.25, abs=0.03)
    assert set(seen) == {row["text"] for row in numbered(120) + numbered(20, start=1000)}
    assert len(small) > 20  # the small part started again


@pytest.mark.parametrize("held_out", [0.0, 0.2])
def test_validation_on_a_mixture_has_every_document_once(tmp_path, held_out):
    """Weights are for training: validation would count the documents of a small part many times."""
    paths = [
        write_rows(tmp_path / f"{i}.jsonl", numbered(n, start=i * 1000)) for i, n in enumerate((200, 20))
    ]
    mixture = [{"path": path, "weight": 1} for path in paths]
    sides = {"held_out": held_out} if held_out else {"validation": mixture}
    data = corpus(tmp_path, mixture, **sides)
    apart = texts(data, data.val_dataloader())
    assert len(set(apart)) == len(apart)
    if not held_out:
        assert len(apart) == 220


def test_unweighted_parts_are_read_once_and_mixed(tmp_path):
    a = write_rows(tmp_path / "a.jsonl", numbered(60))
    b = write_rows(tmp_path / "b.jsonl", numbered(60, start=1000))
    data = corpus(tmp_path, [a, b], shuffle_buffer=16)
    seen = texts(data, data.loader("train", shuffle=False))
    assert sorted(seen) == sorted(row["text"] for row in numbered(60) + numbered(60, start=1000))
    early = [int(text.split(":")[0]) >= 1000 for text in seen[:40]]
    assert 10 < sum(early) < 30


@pytest.mark.parametrize("workers", [0, 2])
def test_token_limit_spans_epochs_and_ends_for_good(tmp_path, workers):
    data = corpus(tmp_path, write_rows(tmp_path / "a.jsonl", numbered(40)))
    loader = data.loader("train", shuffle=True, workers=workers, max_tokens=2000)
    tokens, epochs = 0, 0
    while batches := list(loader_steps(loader)):
        tokens, epochs = tokens + sum(map(real_tokens, batches)), epochs + 1
    assert epochs > 1
    assert 2000 <= tokens < 2000 + 4 * 64
    assert loader.position["tokens"] == tokens


def loader_steps(loader):
    for batch in loader:
        loader.handed()
        yield batch


def test_ranks_stay_in_step(tmp_path):
    """A rank that runs out repeats its first batch until the others have ended too."""
    data = corpus(tmp_path, write_rows(tmp_path / "a.jsonl", numbered(21)), batch_size=1)
    own = [len(rows_of(data.loader("train", True, rank=rank, world=2))) for rank in (0, 1)]
    assert sorted(own) == [10, 11]  # shares differ by one document at most
    turns = itertools.count()
    short = data.loader(
        "train", True, rank=1, world=2, agree=lambda more, tokens: (next(turns) < own[1] + 3, 0)
    )
    batches = []
    for batch in short:
        short.handed()
        batches.append(batch["input_ids"].tolist())
    assert len(batches) == own[1] + 3
    assert batches[own[1] :] == [batches[0]] * 3
    assert short.statistics.repeated == 3
    assert short.position["epoch"] == 1


def test_row_ids_name_tokens_alone(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", numbered(50))
    names = []
    for batch_size, shuffle in itertools.product((3, 8), (True, False)):
        data = corpus(tmp_path, path, batch_size=batch_size)
        names.append(sorted(i for b in data.loader("train", shuffle=shuffle) for i in row_ids(b)))
    assert all(found == names[0] for found in names)
    assert len(set(names[0])) == 50


def test_predict_reads_all_in_one_order(tmp_path):
    data = corpus(tmp_path, write_rows(tmp_path / "a.jsonl", numbered(50)))
    first, again = rows_of(data.predict_dataloader()), rows_of(data.predict_dataloader())
    assert first == again
    assert sum(map(len, first)) == 50
