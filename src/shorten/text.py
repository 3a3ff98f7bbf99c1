"""Look at a corpus: how long its documents are, and which rows are held out if the user names none."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice

import torch

from src.data.columns import Columns
from src.data.corpus import Corpus
from src.data.documents import read_document
from src.data.formats import WHERE
from src.data.judging import judged
from src.data.options import Sources, sources
from src.data.reader import Corpora
from src.data.sources import open_source
from src.errors import ConfigError
from src.models.loading import load_tokenizer

LOOKED_AT = 4_000
"""Documents that are looked at, about."""
LONGEST = 2_048
"""Most tokens of a row."""
SHARE = 0.05
"""Share of the documents that is held out if the user names no held-out rows."""
JUDGED = 500
"""Most held-out rows that a model is judged on."""


@dataclass(frozen=True)
class Text:
    """Holds figures of a corpus.

    Attributes:
        documents: number of documents that were looked at.
        tokens: number of their tokens, each document cut at :data:`LONGEST`.
        length: number of tokens that 95 % of them do not exceed.
        whole: whether these are all documents of the corpus.
    """

    documents: int
    tokens: int
    length: int
    whole: bool


def look(model: str, train: Sources, columns: Columns) -> Text:
    """Measure the first documents of the corpus ``train``, in tokens of the model."""
    corpus = Corpus(tokenizer=model, train=train, batch_size=32, max_length=LONGEST, columns=columns)
    loader = corpus.predict_dataloader()
    lengths: list[int] = []
    whole = True
    for batch in loader:
        lengths += batch["attention_mask"].sum(1).tolist()
        if len(lengths) >= LOOKED_AT:
            whole = False
            break
    at_most = torch.tensor(lengths).double().quantile(0.95)
    return Text(len(lengths), sum(lengths), int(at_most), whole)


def untold(model: str, held: str | None, rows: Sources, columns: Columns) -> str | None:
    """Return why the tokens of answers cannot be told from the rest; None if they can.

    A slow tokenizer does not tell them, nor a chat template that rewrites what the assistant says. A ``fit``,
    whose default is that all tokens count, reads such rows.

    Args:
        model: Hub id or directory of the model.
        held: the rows to judge by, as JSONL; None reads the first :data:`JUDGED` of ``rows``.
        rows: the corpus that holds them.
        columns: which of its columns are read.

    Raises:
        ConfigError: the rows cannot be judged by all tokens, either.
    """
    lines = [line for line in (held or "").split("\n") if line]  # a text may hold other ends of lines
    first = [json.loads(line) for line in lines] or islice(
        open_source(sources(rows, "data")[0], 0, 1), JUDGED
    )
    tokenizer, found = load_tokenizer(model), [*first]
    try:
        judged(tokenizer, found, columns)
    except ConfigError as e:
        judged(tokenizer, found, columns, "all")
        return str(e)
    return None


def hold_out(model: str, train: str, columns: Columns) -> str:
    """Return rows that ``data.held_out`` keeps away from training as JSONL, to judge models by them.

    Args:
        model: Hub id or directory of the model, whose chat template may render the rows.
        train: the corpus, of which the first :data:`JUDGED` such rows are taken.
        columns: which columns of the rows are read.

    Raises:
        ConfigError: the corpus is too small to hold out any; names the option.
    """
    corpus, parts = Corpus(tokenizer=model, train=train, held_out=SHARE), sources(train, "data.train")
    corpora = Corpora(parts, columns, corpus.separator, corpus.rendering, SHARE, apart=True)
    kept: list[str] = []
    for number, row in enumerate(open_source(parts[0], 0, 1)):
        if len(kept) == JUDGED or number == 40 * JUDGED:
            break
        if corpora.wants(read_document(row, columns, corpus.separator, corpus.rendering)):
            said = {key: value for key, value in row.items() if key != WHERE and value is not None}
            kept.append(json.dumps(said, ensure_ascii=False, default=str))
    if not kept:
        raise ConfigError(
            f"--train: '{train}' is too small to hold out {SHARE:.0%} of it; give --held-out FILE."
        )
    return "\n".join(kept) + "\n"
