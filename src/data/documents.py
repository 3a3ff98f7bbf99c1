"""Turn rows of a corpus into documents: a text, and which of its characters are supervised.

There are three kinds of row: plain text; prompt and answer, joined by the separator, with other columns on
which the answer depends (system prompt, input) before the answer; and chat, rendered by the tokenizer's own
template (:mod:`src.data.chat`). Prompt and answer that are lists of messages are a chat of which the answer
is supervised.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from src.data.chat import Span, Turn, read_tools, read_turns, render
from src.data.columns import Columns, filled
from src.data.formats import MAX_DOCUMENT, WHERE, Row
from src.data.rendering import Rendering
from src.data.text import checked
from src.errors import ConfigError

__all__ = ["MAX_DOCUMENT", "Columns", "Document", "read_document"]


@dataclass(frozen=True)
class Document:
    """Holds a text, which of its characters are supervised, and where it comes from.

    Args:
        text: what the model reads.
        spans: first character, and that after the last, of each supervised piece of the text; None if the
            chat template hides which they are.
        where: file and row, for messages.
        raw: what the row says, before any template, date or separator; the document is recognised by it.
        chat: whether a template rendered the text; it sets special tokens itself.
        unread: columns of the row that are not read.
    """

    text: str
    spans: list[Span] | None
    where: str
    raw: str
    chat: bool = False
    unread: tuple[str, ...] = ()


def read_document(row: Row, columns: Columns, separator: str, rendering: Rendering) -> Document:
    """Make a document of a row.

    Args:
        row: values by column.
        columns: which of them are read.
        separator: text between the parts, such as prompt and answer.
        rendering: how chats become text.

    Raises:
        ConfigError: a column is missing, holds the wrong type, or conditions the answer and is not read; or
            the chat cannot be rendered; names the file and the row.
    """
    unread, columns, where = columns.unread(row), columns.of(row), row[WHERE]
    if columns.messages is not None or (
        columns.prompt and any(isinstance(row[c], list) for c in columns.names)
    ):
        chat = read_chat(row, columns)
        text, spans = render(chat.turns, chat.tools, chat.own, where, rendering, chat.raw)
        return Document(text, spans, where, chat.raw, True, unread)
    parts = read_parts(row, columns)
    text = separator.join(parts)
    return Document(text, [(len(text) - len(parts[-1]), len(text))], where, "\n".join(parts), False, unread)


def read_parts(row: Row, columns: Columns) -> list[str]:
    """Return the texts of a row that is no chat, as a model reads them one after the other, the answer last.

    Args:
        row: values by column.
        columns: those of this row.

    Raises:
        ConfigError: a text has the wrong type, or there are tools.
    """
    where = row[WHERE]
    if _given(row, columns.tools) is not None:
        raise ConfigError(
            f"{where}: column '{columns.tools}' holds tools, which only a chat can call. Use 'messages', or "
            f"list it in data.columns.ignore."
        )
    order = (columns.system, columns.prompt, columns.input, columns.text, columns.answer)
    names = [c for c in order if c and (c in columns.names or _given(row, c) is not None)]
    return [checked(row[name], f"{where}: column '{name}'") for name in names]


@dataclass(frozen=True)
class Chat:
    """Holds the chat of a row.

    Attributes:
        turns: its messages, a system prompt first.
        own: for each message, whether it is an answer of the assistant that is supervised.
        tools: tools that the chat may call, or None.
    """

    turns: list[Turn]
    own: list[bool]
    tools: list[Any] | None

    @property
    def raw(self) -> str:
        """What the row says, before any template."""
        return json.dumps([self.turns, self.tools], sort_keys=True, default=str)


def read_chat(row: Row, columns: Columns) -> Chat:
    """Return the chat of a row; of prompt and answer, only the answer's messages are supervised.

    Args:
        row: values by column.
        columns: those of this row.

    Raises:
        ConfigError: a column holds no messages, or another system prompt than the chat begins with.
    """
    where = row[WHERE]
    parts = [(row[name], role) for name, role in zip(columns.names, ("user", "assistant"), strict=False)]
    if columns.messages is None:  # a text beside a list of messages is one message
        parts = [([{"role": r, "content": p}] if isinstance(p, str) else p, r) for p, r in parts]
    *before, last = [read_turns(messages, where, columns.roles) for messages, _ in parts]
    if before and (about := _given(row, columns.input)) is not None:  # what the prompt is about belongs to it
        before[0][-1:] = [{**turn, "content": f"{turn['content']}\n{about}"} for turn in before[0][-1:]]
    turns = [turn for part in (*before, last) for turn in part]
    own = [n >= len(turns) - len(last) and turn["role"] == "assistant" for n, turn in enumerate(turns)]
    if (system := _given(row, columns.system)) is not None:
        first = turns[0]["content"] if turns and turns[0]["role"] == "system" else None
        if first not in (None, system):
            raise ConfigError(
                f"{where}: the chat begins with another system turn than column '{columns.system}' holds. "
                f"List the column in data.columns.ignore to keep that of the chat."
            )
        if first is None:
            message = {"role": "system", "content": system}
            turns, own = [*read_turns([message], where), *turns], [False, *own]
    given = _given(row, columns.tools)
    return Chat(turns, own, None if given is None else read_tools(given, where))


def _given(row: Row, name: str | None) -> Any:
    """Return what a column that a row need not have says; None if it says nothing."""
    value = None if name is None else row.get(name)
    return value if filled(value) else None
