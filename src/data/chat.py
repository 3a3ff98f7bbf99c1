"""Render chats by the tokenizer's own template, and find the characters that the assistant wrote.

What the assistant wrote is found by marking its words before rendering; it is never guessed from the rendered
text. Nothing that a row says is lost in rendering: a turn, a call or a list of tools that the template passes
over is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from src.data.formats import reason
from src.data.rendering import Rendering
from src.data.text import checked
from src.errors import ConfigError

Span = tuple[int, int]
Turn = dict[str, Any]

_OPEN, _CLOSE, _OTHER = (
    "\ue000",
    "\ue001",
    "\ue002",
)  # private-use: around the assistant's words, inside others'
_REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys under which a message holds what the assistant thought."""

_ALIASES = {
    "system": ["system"],
    "developer": ["developer"],
    "user": ["user", "human", "prompter", "player", "instruction"],
    "assistant": ["assistant", "gpt", "chatgpt", "model", "bot", "chatbot", "ai", "bard", "bing", "claude"],
    "tool": ["tool", "function", "observation", "ipython", "tool_response", "function_response"],
}  # fmt: skip
ROLES = {alias: role for role, aliases in _ALIASES.items() for alias in aliases}
"""Roles as templates know them, by the names that corpora give them."""


def read_turns(messages: Any, where: str, roles: dict[str, str] | None = None) -> list[Turn]:
    """Return the messages of a chat as turns: dicts with a known ``role`` and a text ``content``.

    ShareGPT's ``from`` and ``value`` are understood.

    Args:
        messages: what the column of messages holds.
        where: file and row, for a message of error.
        roles: what other names of roles mean, such as ``{tutor: assistant}``.

    Raises:
        ConfigError: they are no messages, or a role has no meaning; names file and row.
    """
    if not isinstance(messages, list):
        raise ConfigError(f"{where}: the chat is {type(messages).__name__}; expected a list of messages.")
    return [_turn(message, where, roles or {}) for message in messages]


def _turn(message: Any, where: str, roles: dict[str, str]) -> Turn:
    if not isinstance(message, dict):
        raise ConfigError(f"{where}: a message is {type(message).__name__}, not an object.")
    message = {key: value for key, value in message.items() if value is not None}  # Parquet fills in nulls
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if content is None and message.get("tool_calls"):
        content = ""
    if role is None or content is None:
        raise ConfigError(f"{where}: a message has {', '.join(message)}; expected 'role' and 'content'.")
    known = roles.get(role) or ROLES.get(str(role).strip().lower())
    if known is None:
        raise ConfigError(
            f"{where}: the role '{role}' of a message is not known; known: {', '.join(ROLES)}. Say what it "
            f"means in data.columns.roles, such as {{{role}: assistant}}."
        )
    return {**message, "role": known, "content": _content(content, where)}


def _content(content: Any, where: str) -> str:
    """Return the text of a message; if it is a list of parts, the parts joined."""
    if not isinstance(content, list):
        return checked(content, f"{where}: a message's content")
    texts = list[str]()
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        if text is None or kind not in ("text", "str"):
            raise ConfigError(f"{where}: a message has a part of type '{kind}'; only parts of text are read.")
        texts.append(checked(text, f"{where}: a part of a message"))
    return "".join(texts)


def read_tools(tools: Any, where: str) -> list[Any]:
    """Return the tools that a chat may call, from a list or its JSON.

    Args:
        tools: what the column of tools holds.
        where: file and row, for a message of error.

    Raises:
        ConfigError: it is neither.
    """
    try:
        parsed = json.loads(tools) if isinstance(tools, str) else tools
    except json.JSONDecodeError as e:
        raise ConfigError(f"{where}: the tools of a chat are no JSON: {e.msg}, column {e.colno}.") from e
    if not isinstance(parsed, list):
        raise ConfigError(f"{where}: the tools of a chat are {type(parsed).__name__}; expected a list.")
    return parsed


def rendered(
    turns: list[Turn],
    tools: list[Any] | None,
    where: str,
    rendering: Rendering,
    raw: str,
    **inputs: Any,
) -> str:
    """Return the text of a chat.

    Args:
        turns: the messages, from :func:`read_turns`.
        tools: tools that the chat may call, or None.
        where: file and row, for a message of error.
        rendering: the template with its date.
        raw: what the row says; it seeds the random choices that a template makes.
        inputs: what else the template is given.

    Raises:
        ConfigError: there is no template, or it refuses the chat.
    """
    if not rendering.tokenizer.chat_template:
        raise ConfigError(
            f"{where} is a chat, but the tokenizer '{rendering.tokenizer.name_or_path}' has no chat "
            "template. Use the tokenizer of an instruction-tuned model, or columns of text."
        )
    try:
        return rendering(turns, raw, tools=tools, **inputs)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as e:
        raise ConfigError(f"{where}: the chat template refuses this chat: {reason(e)}") from e


def render(
    turns: list[Turn],
    tools: list[Any] | None,
    own: Sequence[bool],
    where: str,
    rendering: Rendering,
    raw: str,
) -> tuple[str, list[Span] | None]:
    """Return the text of a chat, and the spans of characters in it that are supervised answers.

    The spans are None if the template hides which characters these are.

    Args:
        turns: the messages, from :func:`read_turns`.
        tools: tools that the chat may call, or None.
        own: for each turn, whether it is an answer of the assistant that is supervised.
        where: file and row, for a message of error.
        rendering: the template with its date.
        raw: what the row says; it seeds the random choices that a template makes.

    Raises:
        ConfigError: the template refuses the chat, or leaves out something that the chat says.
    """

    def apply(turns: list[Turn], tools: list[Any] | None = tools) -> str:
        return rendered(turns, tools, where, rendering, raw)

    plain = apply(turns)
    calls = [n for n, turn in enumerate(turns) if turn.get("tool_calls")]
    if tools and apply(turns, None) == plain:
        raise ConfigError(f"{where}: {_PASSES.format('the tools of this chat')}")
    if calls and apply([{k: v for k, v in t.items() if k != "tool_calls"} for t in turns]) == plain:
        raise ConfigError(f"{where}: {_PASSES.format('the tool_calls of a message')}")
    marked = [
        _marked(turn, mine and n not in calls) for n, (turn, mine) in enumerate(zip(turns, own, strict=True))
    ]
    shown = apply(marked)
    if shown.count(_OTHER) < sum(turn["content"].count(_OTHER) for turn in marked) or any(
        turn["role"] == "assistant" and _answer(turn) not in plain for turn in turns
    ):
        for n, turn in enumerate(turns):  # what is passed over can be changed without a trace
            if (
                turn["content"]
                and apply([*turns[:n], {**turn, "content": turn["content"] + "x"}, *turns[n + 1 :]]) == plain
            ):
                raise ConfigError(f"{where}: {_PASSES.format('a turn of the ' + turn['role'])}")
    text, spans = _unmark(shown.replace(_OTHER, ""))
    called = [_called(turns, n, plain, apply) for n in calls if own[n]]
    if text != plain or None in called:
        return plain, None
    return plain, sorted([*spans, *(span for span in called if span is not None)])


_PASSES = "the chat template passes over {}. Use another tokenizer, or leave such rows out."


def _answer(turn: Turn) -> str:
    """Return what the assistant says after its thoughts, which templates drop from the turns of the past."""
    return str(turn["content"]).rpartition("</think>")[2].strip()


def _marked(turn: Turn, own: bool) -> Turn:
    if own:
        thoughts = {key: _wrap(turn[key]) for key in _REASONING if isinstance(turn.get(key), str)}
        return {**turn, **thoughts, "content": _mark(turn["content"])}
    core = turn["content"].strip()
    if turn["role"] == "assistant" or not core:
        return turn
    middle = len(core) // 2  # templates look at how a text begins and ends
    return {**turn, "content": turn["content"].replace(core, core[:middle] + _OTHER + core[middle:], 1)}


def _called(turns: list[Turn], at: int, plain: str, apply: Any) -> Span | None:
    """Return the span of a turn with tool calls: what stands in the place of the assistant's words."""
    words = {"role": "assistant", "content": _OPEN}
    try:
        head, mark, tail = apply([*turns[:at], words, *turns[at + 1 :]]).partition(_OPEN)
    except ConfigError:
        return None
    head, tail = head.rstrip(), tail.lstrip()
    if not (mark and plain.startswith(head) and plain.endswith(tail)):
        return None
    said = plain[len(head) : len(plain) - len(tail)]
    start = len(head) + len(said) - len(said.lstrip())
    return start, start + len(said.strip())


def _mark(content: str) -> str:
    """Mark the reasoning, if any, and the answer, inside outer blanks, which templates strip."""
    head, tag, tail = content.rpartition("</think>")
    opening, think, reasoning = head.rpartition("<think>")
    return opening + think + _wrap(reasoning) + tag + _wrap(tail)


def _wrap(text: str) -> str:
    core = text.strip()
    return text.replace(core, f"{_OPEN}{core}{_CLOSE}", 1) if core else text


def _unmark(rendered: str) -> tuple[str, list[Span]]:
    """Return the rendered text without marks, and the marked spans.

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
