"""Put side by side, unedited, what models answer to the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from src.data.judging import read_rows
from src.errors import ConfigError

Answers = list[tuple[str, str]]
"""Prompt and answer of each row."""


def read_answers(directory: Path) -> dict[str, Answers]:
    """Return what models wrote, by the name of the file, from the files ``*.jsonl`` of ``generate``.

    Raises:
        ConfigError: a file cannot be read, or they do not answer the same prompts.
    """
    found = {path.stem: [*map(_answer, read_rows(str(path)))] for path in sorted(directory.glob("*.jsonl"))}
    if len({tuple(asked for asked, _ in rows) for rows in found.values()}) > 1:
        raise ConfigError(
            f"run: the files of '{directory}' answer different prompts ({', '.join(found)}). Write all "
            f"with generate and the same --prompts."
        )
    return found


def _answer(row: dict[str, Any]) -> tuple[str, str]:
    """Return prompt and answer of a row; a plain text has its prompt in it."""
    if "messages" in row:
        *asked, said = (turn["content"] for turn in row["messages"])
        return "\n".join(asked), said
    return (row["prompt"], row["completion"]) if "prompt" in row else ("", row["text"])


def answers_of(found: dict[str, Answers], names: Sequence[str]) -> list[list[str]]:
    """Return the table of answers: a heading with the models, then a row for each prompt; empty without any.

    Args:
        found: prompts and answers by model, the same prompts for all.
        names: the models of a report, whose order is that of the columns; others follow.
    """
    order = sorted(found, key=lambda name: names.index(name) if name in names else len(names))
    rows = zip(*(found[name] for name in order), strict=True)
    body = [[cells[0][0], *(said for _, said in cells)] for cells in rows]
    return [["prompt", *order], *body] if body else []
