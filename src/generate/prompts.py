"""Turn rows of a corpus into prompts that a model continues, and continuations into rows of a corpus.

A chat is continued at its end, or where the answer begins that it ends with; a question where its answer
begins; and plain text after a number of tokens. A model with a chat template is asked a question as a chat.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from src.data.chat import rendered
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
        row: makes a row of a corpus from the text of the continuation.
    """

    ids: list[int]
    row: Callable[[str], dict[str, Any]]


class Prompts:
    """Turns rows of a corpus into prompts, when it is called with the rows.

    Args:
        tokenizer: the model's.
        columns: which columns of a row are read.
        start: number of tokens of a plain text that its prompt keeps; the model writes the rest.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, columns: Columns, start: int) -> None:
        self.tokenizer, self.columns, self.start = tokenizer, columns, start
        self.rendering = Rendering(tokenizer)

    def __call__(self, rows: Rows) -> list[Prompt]:
        """Return the prompts of rows, in their order.

        Raises:
            ConfigError: a row has no column to read, or no turn to answer; names the row.
        """
        return [self._prompt(row) for row in rows]

    def _prompt(self, row: Row) -> Prompt:
        columns = self.columns.of(row)
        if columns.text is not None:
            return self._text(read_parts(row, columns)[-1])
        if columns.messages is None and getattr(self.tokenizer, "chat_template", None) is None:
            return self._question(read_parts(row, columns)[:-1])
        return self._chat(read_chat(row, columns), row[WHERE])

    def _text(self, text: str) -> Prompt:
        ids = self.tokenizer(text).input_ids[: self.start]
        given = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        return Prompt(ids, lambda written: {"text": given + written})

    def _question(self, parts: list[str]) -> Prompt:
        asked = "\n".join(parts)
        ids = self.tokenizer(asked + "\n").input_ids
        return Prompt(ids, lambda written: {"prompt": asked, "completion": written})

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

        def row(written: str) -> dict[str, Any]:
            return {"messages": [*turns, {"role": "assistant", "content": written}], **known}

        return Prompt(ids, row)
