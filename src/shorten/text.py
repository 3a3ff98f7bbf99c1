"""What a corpus is like, and which of its rows are held out where no file of such rows is given."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from src.data.columns import WELL_KNOWN
from src.data.corpus import Corpus
from src.data.documents import read_document
from src.data.formats import WHERE
from src.data.options import sources
from src.data.reader import Corpora
from src.data.sources import open_source
from src.errors import ConfigError
from src.files import write_text

LOOKED_AT = 4_000
"""Documents that are looked at."""
LONGEST = 2_048
"""Tokens of a row, at most."""
SHARE = 0.05
"""Share of the documents that is held out where no file of held-out rows is given."""
JUDGED = 500
"""Held-out rows that a model is judged on, at most."""


@dataclass(frozen=True)
class Text:
    """Figures of a corpus.

    Attributes:
        documents: documents looked at.
        tokens: their tokens, each document up to :data:`LONGEST`.
        length: tokens that 95 % of them do not exceed.
        whole: whether these are all documents.
    """

    documents: int
    tokens: int
    length: int
    whole: bool


def look(model: str, train: str) -> Text:
    """Read the first documents of a corpus with a model's tokenizer."""
    loader = Corpus(tokenizer=model, train=train, batch_size=32, max_length=LONGEST).predict_dataloader()
    lengths: list[int] = []
    whole = True
    for batch in loader:
        lengths += batch["attention_mask"].sum(1).tolist()
        if len(lengths) >= LOOKED_AT:
            whole = False
            break
    at_most = torch.tensor(lengths).double().quantile(0.95)
    return Text(len(lengths), sum(lengths), int(at_most), whole)


def hold_out(model: str, train: str, path: Path) -> None:
    """Write the first rows that ``data.held_out`` keeps from training, :data:`JUDGED` at most, as JSONL.

    Raises:
        ConfigError: there is none among the first rows; names the option.
    """
    corpus, parts = Corpus(tokenizer=model, train=train, held_out=SHARE), sources(train, "data.train")
    corpora = Corpora(parts, WELL_KNOWN, corpus.separator, corpus.rendering, SHARE, apart=True)
    kept: list[str] = []
    for number, row in enumerate(open_source(parts[0], 0, 1)):
        if len(kept) == JUDGED or number == 40 * JUDGED:
            break
        if corpora.wants(read_document(row, WELL_KNOWN, corpus.separator, corpus.rendering)):
            said = {key: value for key, value in row.items() if key != WHERE and value is not None}
            kept.append(json.dumps(said, ensure_ascii=False, default=str))
    if not kept:
        raise ConfigError(
            f"--train: '{train}' is too small to hold out {SHARE:.0%} of it; give --held-out FILE."
        )
    write_text(path, "\n".join(kept) + "\n")
