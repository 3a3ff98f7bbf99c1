"""Choose the columns of a row to read, and refuse to pass over one on which the answer depends.

A row may hold more than its prompt: Alpaca's ``input``, a system prompt, the tools of a chat. Such a column
is read, or the row is refused by the column's name. A warning names, once, every other column that is not
read.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from src.data.formats import WHERE, Row
from src.errors import ConfigError


@dataclass(frozen=True)
class Columns:
    """Names the columns of a row that are read.

    If none of text, prompt, answer and messages is named, well-known names are looked for. Unless the row is
    plain text, so are well-known names for those of input, system and tools that are not named.

    Args:
        text: column of plain text.
        prompt: column of the prompt, together with ``answer``: texts, or lists of chat messages.
        answer: column of the answer.
        messages: column of chat messages, a list of ``{"role", "content"}``.
        input: column of what the prompt is about; it stands between prompt and answer where it is filled.
        system: column of a system prompt; it stands before the prompt, in a chat as its first turn.
        tools: column of the tools that a chat may call, a list or its JSON.
        ignore: columns that condition the answer and are left out nevertheless.
        roles: for each role of a chat whose name is not well known, the role that it means, such as
            ``{tutor: assistant}``.

    Raises:
        ConfigError: more than one of text, prompt with answer, and messages is named; or one of prompt and
            answer is missing.
    """

    text: str | None = None
    prompt: str | None = None
    answer: str | None = None
    messages: str | None = None
    input: str | None = None
    system: str | None = None
    tools: str | None = None
    ignore: tuple[str, ...] = ()
    roles: dict[str, str] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        kinds = [self.text, self.messages, self.prompt or self.answer]
        if sum(kind is not None for kind in kinds) > 1 or (self.prompt is None) != (self.answer is None):
            given = [
                key for key in ("text", "prompt", "answer", "messages") if getattr(self, key) is not None
            ]
            raise ConfigError(
                f"data.columns: give 'text', or 'prompt' and 'answer', or 'messages'; found {given}."
            )

    @property
    def names(self) -> list[str]:
        """The columns that a row must have."""
        return [c for c in (self.text, self.prompt, self.answer, self.messages) if c is not None]

    def of(self, row: Row) -> Columns:
        """Return the columns to read from ``row``: these, completed by the first well-known ones that it has.

        Raises:
            ConfigError: the row lacks them, or fills one that conditions the answer and is not read.
        """
        layout = _layout(self, tuple(row))
        if layout is None:
            present = ", ".join(f"'{name}'" for name in row if name != WHERE)
            wanted = " and ".join(f"'{name}'" for name in self.names) or "any column known by name"
            raise ConfigError(
                f"{row[WHERE]} lacks {wanted}; found: {present or 'nothing'}. Set data.columns to the "
                f"names of 'text', of 'prompt' and 'answer', or of 'messages'."
            )
        columns, conditions, _ = layout
        for name in conditions:
            if filled(row[name]):
                raise ConfigError(
                    f"{row[WHERE]}: column '{name}' conditions the answer and is not read. Name it in "
                    f"data.columns as 'input', 'system' or 'tools', or list it in 'ignore'."
                )
        return columns

    def unread(self, row: Row) -> tuple[str, ...]:
        """Return the columns of ``row`` that are not read."""
        layout = _layout(self, tuple(row))
        return () if layout is None else layout[2]


WELL_KNOWN = Columns()

_KNOWN = (
    Columns(messages="messages"),
    Columns(messages="conversations"),
    Columns(prompt="question", answer="answer"),
    Columns(prompt="prompt", answer="completion"),
    Columns(prompt="prompt", answer="response"),
    Columns(prompt="prompt", answer="answer"),
    Columns(prompt="instruction", answer="output"),
    Columns(prompt="instruction", answer="response"),
    Columns(text="text"),
    Columns(text="content"),
)
"""Columns understood without being told."""

_INPUT: dict[tuple[str | None, str | None], str] = {
    ("instruction", "output"): "input",
    ("instruction", "response"): "context",
}
"""The columns of further input that Alpaca and Dolly have beside prompt and answer."""

_CONDITIONS = (
    "input", "inputs", "context", "contexts", "system", "system_prompt", "system_message", "tools",
    "functions", "history", "documents", "document", "passage", "article", "choices", "options", "image",
    "images", "audio", "audios", "video", "videos",
)  # fmt: skip
"""Names of columns without which an answer is not the answer to its prompt."""


def filled(value: Any) -> bool:
    """Return whether a column has content: it is not null, blank or empty."""
    return bool(value.strip() if isinstance(value, str) else value is not None and value not in ([], {}))


@lru_cache(maxsize=1024)
def _layout(
    columns: Columns, names: tuple[str, ...]
) -> tuple[Columns, tuple[str, ...], tuple[str, ...]] | None:
    """Return the columns to read, those that must be empty, those not read; None if one is missing."""
    kinds = (
        replace(columns, text=k.text, prompt=k.prompt, answer=k.answer, messages=k.messages) for k in _KNOWN
    )
    fitting = (k for k in ([columns] if columns.names else kinds) if set(k.names) <= set(names))
    if (kind := next(fitting, None)) is None:
        return None
    if kind.text is None:

        def found(*known: str | None) -> str | None:
            return next((n for n in names if n in known and n not in (*columns.names, *columns.ignore)), None)

        kind = replace(
            kind,
            input=kind.input or found(_INPUT.get((kind.prompt, kind.answer))),
            system=kind.system or found("system", "system_prompt", "system_message"),
            tools=kind.tools or found("tools"),
        )
    read = {*kind.names, kind.input, kind.system, kind.tools, *kind.ignore, WHERE}
    rest = tuple(name for name in names if name not in read)
    return kind, tuple(n for n in rest if n in _CONDITIONS and kind.text is None), rest
