"""The fingerprint of a corpus: of its documents and their order, wherever shards end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.cache import Cache, CachedCorpus
from src.cache.fingerprint import chained, documents
from src.errors import ConfigError
from tests.cached import workspace

Document = list[tuple[int, bool]]
TOKEN = st.tuples(st.integers(0, 99), st.booleans())
DOCUMENTS = st.lists(st.lists(TOKEN, min_size=1, max_size=6), max_size=8)


def fingerprint(corpus: list[Document]) -> str:
    flat = [pair for document in corpus for pair in document]
    tokens, supervised = (np.array([pair[i] for pair in flat]) for i in (0, 1))
    return documents(tokens.astype(np.int32), supervised.astype(bool), np.array([*map(len, corpus)], int))


@given(DOCUMENTS, st.data())
def test_it_is_the_same_however_the_corpus_is_divided(corpus: list[Document], data: Any) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(corpus)), max_size=4)))
    pieces = [corpus[a:b] for a, b in zip([0, *cuts], [*cuts, len(corpus)], strict=True)]
    assert chained((fingerprint(piece), len(piece)) for piece in pieces) == fingerprint(corpus)


@given(DOCUMENTS, DOCUMENTS)
def test_other_documents_have_another_one(one: list[Document], other: list[Document]) -> None:
    """Order, borders of documents and what is supervised included."""
    assert (fingerprint(one) == fingerprint(other)) == (one == other)


def test_a_cache_of_other_shards_is_of_the_same_corpus(tmp_path: Path) -> None:
    ws = workspace(tmp_path)
    many, few = (Cache(ws.write(str(size), shard_positions=size)) for size in (300, 700))
    assert len(many.shards) > len(few.shards)
    assert many.corpus == few.corpus
    CachedCorpus(tokenizer=ws.model, train=few.path, corpus=many.corpus)
    answers = ws.write("answers", supervise="answer")
    with pytest.raises(ConfigError, match=r"data: corpus"):
        CachedCorpus(tokenizer=ws.model, train=answers, corpus=many.corpus)
