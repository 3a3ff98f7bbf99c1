"""Turn rows of a corpus into prompts that a model continues, and continuations into rows of a corpus.

A chat is continued where its last answer begins, a question where its answer begins, and plain text after a
number of tokens. A model with a chat template is asked a question as a chat.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from src.data.chat import read_turns
from src.data.columns import Columns, filled
from src.data.formats import WHERE, Row
from src.data.judging import Rows
from src.data.rendering import Rendering
from src.data.text import checked
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
        columns, where = self.columns.of(row), row[WHERE]
        if columns.text is not None:
            return self._text(checked(row[columns.text], f"{where}: column '{columns.text}'"))
        if columns.messages is None and getattr(self.tokenizer, "chat_template", None) is None:
            return self._question(row, columns)
        return self._chat(self._turns(row, columns), where)

    def _text(self, text: str) -> Prompt:
        ids = self.tokenizer(text).input_ids[: self.start]
        given = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        return Prompt(ids, lambda written: {"text": given + written})

    def _question(self, row: Row, columns: Columns) -> Prompt:
        names = [name for name in (columns.system, columns.prompt, columns.input) if name]
        asked = "\n".join(checked(row[name], name) for name in names if filled(row.get(name)))
        ids = self.tokenizer(asked + "\n").input_ids
        return Prompt(ids, lambda written: {"prompt": asked, "completion": written})

    def _turns(self, row: Row, columns: Columns) -> list[dict[str, Any]]:
        """Return the turns before the answer that the model writes anew."""
        where = row[WHERE]
        if columns.messages is not None:
            turns = read_turns(row[columns.messages], where, columns.roles)
            last = max((n for n, turn in enumerate(turns) if turn["role"] == "assistant"), default=len(turns))
            turns = turns[:last]
        else:
            asked = row[columns.prompt or ""]
            turns = read_turns(asked, where) if isinstance(asked, list) else [_turn("user", asked)]
        if columns.input and filled(row.get(columns.input)):
            turns[-1] = {**turns[-1], "content": f"{turns[-1]['content']}\n{row[columns.input]}"}
        if columns.system and filled(row.get(columns.system)):
            turns = [_turn("system", row[columns.system]), *turns]
        return turns

    def _chat(self, turns: list[dict[str, Any]], where: str) -> Prompt:
        if not turns or turns[-1]["role"] == "assistant":
            raise ConfigError(
                f"{where}: the chat has no turn before its last answer; there is nothing to answer."
            )
        text = self.rendering(turns, where, add_generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return Prompt(ids, lambda written: {"messages": [*turns, _turn("assistant", written)]})


def _turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}
