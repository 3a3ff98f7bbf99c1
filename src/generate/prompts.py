"""Turn rows of a corpus into prompts that a model continues, and continuations into rows of a corpus.

A chat is continued at its end, or where the answer begins that it ends with; a question where its answer
begins; and plain text after a number of tokens. A model with a chat template is asked a question as a chat.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from src.data.chat import render, rendered
from src.data.columns import Columns
from src.data.documents import Chat, read_chat, read_parts
from src.data.formats import WHERE, Row
from src.data.judging import Rows
from src.data.rendering import Rendering
from src.errors import ConfigError


@dataclass(frozen=True)
class Prompt:
    """What a model is given, and how its continuation becomes a row.

    Attributes:
        ids: the tokens of the prompt.
        row: makes a row of a corpus from the tokens of the continuation.
    """

    ids: list[int]
    row: Callable[[list[int]], dict[str, Any]]


class Prompts:
    """Turns rows of a corpus into prompts, when it is called with the rows.

    Args:
        tokenizer: the model's.
        columns: which columns of a row are read.
        start: number of tokens of a plain text that its prompt keeps; the model writes the rest.
        begins: the token that begins a text by the model's config, if the tokenizer names none.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, columns: Columns, start: int, begins: int | None = None
    ) -> None:
        self.tokenizer, self.columns, self.start, self.begins = tokenizer, columns, start, begins
        self.rendering = Rendering(tokenizer)

    def __call__(self, rows: Rows) -> list[Prompt]:
        """Return the prompts of rows, in their order.

        Raises:
            ConfigError: a row has no column to read, no text, or no turn to answer; names the row.
        """
        return [self._prompt(row) for row in rows]

    def _prompt(self, row: Row) -> Prompt:
        columns = self.columns.of(row)
        if columns.text is not None:
            return self._text(read_parts(row, columns)[-1], row[WHERE])
        if columns.messages is None and getattr(self.tokenizer, "chat_template", None) is None:
            return self._question(read_parts(row, columns)[:-1])
        return self._chat(read_chat(row, columns), row[WHERE])

    def _text(self, text: str, where: str) -> Prompt:
        ids = self.tokenizer(text).input_ids[: self.start]
        if not ids:
            raise ConfigError(f"{where}: the text is empty; there is nothing to go on from.")
        return Prompt(ids, lambda new: {"text": self._words([*ids, *new])})

    def _question(self, parts: list[str]) -> Prompt:
        asked = "\n".join(parts)
        ids = self.tokenizer(asked + "\n").input_ids

        def row(new: list[int]) -> dict[str, Any]:
            given, whole = self._words(ids), self._words([*ids, *new])
            said = whole[len(given) :] if whole.startswith(given) else self._words(new)
            return {"prompt": asked, "completion": said}

        return Prompt(ids, row)

    def _chat(self, chat: Chat, where: str) -> Prompt:
        """Return the prompt of the chat's next answer, or of the answer that it ends with, written anew."""
        answered = chat.turns and chat.turns[-1]["role"] == "assistant"
        turns = chat.turns[:-1] if answered else chat.turns
        if not turns or turns[-1]["role"] == "assistant":
            raise ConfigError(
                f"{where}: the chat has no turn before its last answer; there is nothing to answer."
            )
        text = rendered(turns, chat.tools, where, self.rendering, chat.raw, add_generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        known = {"tools": chat.tools} if chat.tools else {}

        def row(new: list[int]) -> dict[str, Any]:
            return {"messages": [*turns, {"role": "assistant", "content": self._words(new)}], **known}

        return Prompt(ids, row)

    def questions(self, number: int) -> list[Prompt]:
        """Return prompts that end where the words of a user begin, all the same: the model asks.

        An instruction-tuned model that goes on there writes questions like those of its training (Magpie,
        arXiv 2406.08464). Each becomes a chat of one turn.

        Args:
            number: how many.

        Raises:
            ConfigError: the tokenizer has no chat template, or the template rewrites what a user says.
        """
        if not self.tokenizer.chat_template:
            raise ConfigError(
                "--questions: the tokenizer has no chat template, so the model knows no user who asks. Take "
                "an instruction-tuned model, or give --prompts."
            )
        turn, where = {"role": "user", "content": "?"}, "--questions: a question"
        text, spans = render([turn], None, [True], where, self.rendering, "")
        if not spans:
            raise ConfigError("--questions: the chat template rewrites what a user says. Give --prompts.")
        begin, stop = spans[0]
        ids, end = self.tokenizer(text[:begin], add_special_tokens=False).input_ids, text[stop:].strip()

        def row(new: list[int]) -> dict[str, Any]:
            said, ended, _ = str(self.tokenizer.decode(new)).partition(end) if end else ("", "", "")
            if ended:  # the model has gone on behind the turn: what ends it is no stop token
                new = self.tokenizer(said, add_special_tokens=False).input_ids
            return {"messages": [{"role": "user", "content": self._words(new).strip()}]}

        return [Prompt(ids, row)] * number

    def documents(self, number: int) -> list[Prompt]:
        """Return prompts of the one token that begins a text, all the same: the model writes what it knows.

        Drawn at temperature 1, such texts follow the model's own distribution (LLM-QAT, arXiv 2305.17888).
        Where no token begins a text, the one that ends it stands before the next.

        Args:
            number: how many.

        Raises:
            ConfigError: the tokenizer has neither token.
        """
        tokens = (self.tokenizer.bos_token_id, self.begins, self.tokenizer.eos_token_id)
        first = next((token for token in tokens if token is not None), None)
        if first is None:
            raise ConfigError(
                "--documents: the tokenizer has no token that begins or ends a text. Give --prompts."
            )
        return [Prompt([first], lambda new: {"text": self._words(new)})] * number

    def _words(self, ids: list[int]) -> str:
        """Return tokens as text. Many tokenizers drop the space before the first one of a text."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))
