"""Rows of a corpus as documents: a text, and which of its characters are supervised.

Three kinds of row: plain text, prompt and answer (``prompt + separator + answer``), and chat,
rendered by the tokenizer's own template. In a chat the supervised characters are what the assistant
wrote, found by marking its words before rendering; they are never guessed from the rendered text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from src.data.sources import MAX_DOCUMENT, WHERE, Row, reason
from src.errors import ConfigError

Span = tuple[int, int]

_OPEN, _CLOSE = "\ue000", "\ue001"  # private-use characters around what the assistant wrote
_HALF = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Columns:
    """Which columns hold what; all None means: look for well-known names.

    Args:
        text: column of plain text.
        prompt: column of the prompt, together with ``answer``.
        answer: column of the answer.
        messages: column of chat messages, a list of ``{"role", "content"}``.
    """

    text: str | None = None
    prompt: str | None = None
    answer: str | None = None
    messages: str | None = None

    def __post_init__(self) -> None:
        kinds = [self.text, self.messages, self.prompt or self.answer]
        if sum(kind is not None for kind in kinds) > 1 or (self.prompt is None) != (self.answer is None):
            raise ConfigError(
                f"data.columns: give 'text', or 'prompt' and 'answer', or 'messages'; found {self}."
            )

    @property
    def names(self) -> list[str]:
        """The names given."""
        return [c for c in (self.text, self.prompt, self.answer, self.messages) if c is not None]

    def of(self, row: Row) -> Columns:
        """The columns to read from ``row``: these, or the first well-known ones that it has.

        Raises:
            ConfigError: the row lacks them; says what it has.
        """
        for columns in [self] if self.names else _KNOWN:
            if all(name in row for name in columns.names):
                return columns
        found = ", ".join(f"'{name}'" for name in row if name != WHERE)
        wanted = " and ".join(f"'{name}'" for name in self.names) or "any column known by name"
        raise ConfigError(
            f"{row[WHERE]} lacks {wanted}; found: {found or 'nothing'}. Set data.columns to the "
            f"names of 'text', of 'prompt' and 'answer', or of 'messages'."
        )


WELL_KNOWN = Columns()

_KNOWN = (
    Columns(messages="messages"),
    Columns(messages="conversations"),
    Columns(prompt="question", answer="answer"),
    Columns(prompt="prompt", answer="completion"),
    Columns(prompt="prompt", answer="response"),
    Columns(prompt="prompt", answer="answer"),
    Columns(prompt="instruction", answer="output"),
    Columns(text="text"),
    Columns(text="content"),
)
"""Columns understood without being told."""


@dataclass(frozen=True)
class Document:
    """A text and where it comes from.

    Args:
        text: what the model reads.
        spans: the supervised characters; None if the chat template hides which they are.
        where: file and row.
        chat: the text was rendered by a template, which sets special tokens itself.
    """

    text: str
    spans: list[Span] | None
    where: str
    chat: bool = False


def read_document(row: Row, columns: Columns, separator: str, tokenizer: PreTrainedTokenizerBase) -> Document:
    """Make a document of a row.

    Raises:
        ConfigError: a column is missing or holds the wrong type, or the chat cannot be rendered;
            names the file and the row.
    """
    columns, where = columns.of(row), row[WHERE]
    if columns.messages is not None:
        return _chat(row[columns.messages], where, tokenizer)
    parts = [_checked(row[name], f"{where}: column '{name}'") for name in columns.names]
    text = separator.join(parts)
    return Document(text, [(len(text) - len(parts[-1]), len(text))], where)


def _checked(value: Any, what: str) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
        raise ConfigError(f"{what} holds {kind}; expected text.")
    if len(value) > MAX_DOCUMENT:
        raise ConfigError(f"{what} holds {len(value):,} characters; at most {MAX_DOCUMENT:,} are read.")
    if not value.isascii() and _HALF.search(value):
        raise ConfigError(f"{what} holds half of a surrogate pair, which no UTF-8 text can.")
    return value


def _chat(messages: Any, where: str, tokenizer: PreTrainedTokenizerBase) -> Document:
    if not isinstance(messages, list):
        raise ConfigError(f"{where}: the chat is {type(messages).__name__}; expected a list of messages.")
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{where} is a chat, but the tokenizer '{tokenizer.name_or_path}' has no chat "
            "template. Use the tokenizer of an instruction-tuned model, or columns of text."
        )
    turns = [_turn(message, where) for message in messages]
    marked = [{**t, "content": _mark(t["content"])} if t["role"] == "assistant" else t for t in turns]
    try:
        plain = str(tokenizer.apply_chat_template(turns, tokenize=False))
        rendered = str(tokenizer.apply_chat_template(marked, tokenize=False))
    except (TemplateError, TypeError, ValueError, KeyError) as e:
        raise ConfigError(f"{where}: the chat template refuses this chat: {reason(e)}") from e
    text, spans = _unmark(rendered)
    return Document(plain, spans if text == plain else None, where, chat=True)


def _turn(message: Any, where: str) -> dict[str, str]:
    """A message as ``{"role", "content"}``; ShareGPT's ``from`` and ``value`` are understood."""
    if not isinstance(message, dict):
        raise ConfigError(f"{where}: a message is {type(message).__name__}, not an object.")
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if role is None or content is None:
        raise ConfigError(f"{where}: a message has {', '.join(message)}; expected 'role' and 'content'.")
    role = {"human": "user", "gpt": "assistant"}.get(role, role)
    return {**message, "role": role, "content": _checked(content, f"{where}: a message's content")}


def _mark(content: str) -> str:
    """Mark the reasoning, if any, and the answer, inside outer blanks, which templates strip."""
    head, tag, tail = content.rpartition("</think>")
    opening, think, reasoning = head.rpartition("<think>")
    return opening + think + _wrap(reasoning) + tag + _wrap(tail)


def _wrap(text: str) -> str:
    core = text.strip()
    return text.replace(core, f"{_OPEN}{core}{_CLOSE}", 1) if core else text


def _unmark(rendered: str) -> tuple[str, list[Span]]:
    """The rendered text without marks, and the marked spans.

    Tags around a reasoning that the template kept are the assistant's own words too.
    """
    text, spans = "", list[Span]()
    for piece in re.split(f"({_OPEN}[^{_CLOSE}]*{_CLOSE})", rendered):
        if not piece.startswith(_OPEN):
            text += piece
            continue
        start = len(text)
        text += piece[1:-1]
        tag = re.search(r"<think>\s*$", text[:start])
        if spans and re.fullmatch(r"\s*</think>\s*", text[spans[-1][1] : start]):
            start = spans.pop()[0]
        elif tag:
            start = tag.start()
        spans.append((start, len(text)))
    return text, spans
