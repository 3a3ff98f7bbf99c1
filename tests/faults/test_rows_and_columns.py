"""No row and no column disappears silently: it is used, or refused or counted by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from src.data import Columns
from src.data.documents import read_document
from src.data.encode import IGNORE, Encoder
from src.data.rendering import Rendering
from src.data.sources import WHERE
from src.errors import ConfigError
from tests.data_tools import (
    CALL,
    CALLING,
    CHATML,
    LLAMA3,
    MISTRAL,
    SAID,
    TOOLS,
    USER,
    byte_tokenizer,
    corpus,
    write_rows,
)

THOUGHT = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n{% endif %}"


def encoded(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, columns: Columns | None = None, **options: Any
) -> tuple[str, list[str]]:
    """The text of a row, and what of it is supervised."""
    keys = {"max_length": 999, "supervise": "answer", "too_long": "truncate", "bos": None, "eos": True}
    rendering = Rendering(tokenizer)
    document = read_document({WHERE: "a.jsonl row 1", **row}, columns or Columns(), "\n", rendering)
    ((found,),) = Encoder(tokenizer, **{**keys, **options})([document])
    runs: list[list[int]] = [[]]
    for token, label in zip(found.ids, found.labels, strict=True):
        runs += [[]] if label == IGNORE else []
        runs[-1] += [] if label == IGNORE else [token]
    return str(tokenizer.decode(found.ids)), [str(tokenizer.decode(run)) for run in runs if run]


# ---------------------------------------------------------------------- columns that condition the answer


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"instruction": "Sort.", "input": "3 1", "output": "1 3"}, "Sort.\n3 1\n1 3</s>"),
        ({"instruction": "Sort.", "input": "", "output": "1 3"}, "Sort.\n1 3</s>"),
        ({"instruction": "Sort.", "input": None, "output": "1 3"}, "Sort.\n1 3</s>"),
        ({"instruction": "Who?", "context": "Ann came.", "response": "Ann"}, "Who?\nAnn came.\nAnn</s>"),
        ({"system": "Be terse.", "prompt": "Who?", "completion": "Ann"}, "Be terse.\nWho?\nAnn</s>"),
        ({"system_prompt": "Be.", "question": "Who?", "answer": "Ann"}, "Be.\nWho?\nAnn</s>"),
    ],
)
def test_what_conditions_the_answer_stands_before_it(row: dict[str, Any], text: str) -> None:
    found, said = encoded(row, byte_tokenizer())
    assert found == text
    assert said == [text.rpartition("\n")[2]]


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"question": "Who?", "context": "Ann came.", "answer": "Ann"}, "context"),
        ({"prompt": "Which?", "choices": ["a", "b"], "completion": "a"}, "choices"),
        ({"instruction": "Go on.", "history": [["a", "b"]], "output": "c"}, "history"),
        ({"prompt": "Add.", "tools": TOOLS, "completion": "4"}, "tools"),
        ({"messages": [USER, SAID], "images": ["a.png"]}, "images"),
        ({"messages": [USER, SAID], "documents": [{"text": "x"}]}, "documents"),
    ],
)
def test_a_column_that_conditions_the_answer_is_refused_by_name_or_ignored_by_name(
    row: dict[str, Any], column: str
) -> None:
    tokenizer = byte_tokenizer(CHATML)
    with pytest.raises(ConfigError, match=rf"a\.jsonl row 1: column '{column}' .*data\.columns.*ignore"):
        encoded(row, tokenizer)
    bare = {key: value for key, value in row.items() if key != column}
    ignoring = encoded(row, tokenizer, Columns(ignore=(column,)))
    assert ignoring == encoded(bare, tokenizer) == encoded({**bare, column: []}, tokenizer)


def test_an_input_may_be_named() -> None:
    row = {"question": "Who?", "context": "Ann came.", "answer": "Ann"}
    assert encoded(row, byte_tokenizer(), Columns(input="context"))[0] == "Who?\nAnn came.\nAnn</s>"
    named = Columns(prompt="question", answer="answer", input="context")
    assert encoded(row, byte_tokenizer(), named)[0] == "Who?\nAnn came.\nAnn</s>"


def test_an_input_belongs_to_a_prompt_of_messages_too() -> None:
    """It was passed over where prompt and answer are lists of messages."""
    tokenizer = byte_tokenizer(CHATML)
    asked = {"instruction": [USER], "input": "Ann came.", "output": [SAID]}
    whole = {**USER, "content": f"{USER['content']}\nAnn came."}
    assert encoded(asked, tokenizer) == encoded({"instruction": [whole], "output": [SAID]}, tokenizer)
    empty = {**asked, "input": ""}
    assert encoded(empty, tokenizer) == encoded({"instruction": [USER], "output": [SAID]}, tokenizer)


@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_column_is_the_first_turn_of_a_chat(name: str) -> None:
    tokenizer, system = byte_tokenizer(CHATML), {"role": "system", "content": "Be terse."}
    as_turn = encoded({"messages": [system, USER, SAID]}, tokenizer)
    assert encoded({"messages": [USER, SAID], name: "Be terse."}, tokenizer) == as_turn
    assert encoded({"messages": [system, USER, SAID], name: "Be terse."}, tokenizer) == as_turn
    with pytest.raises(ConfigError, match=f"another system turn than column '{name}'"):
        encoded({"messages": [system, USER, SAID], name: "Be kind."}, tokenizer)


@pytest.mark.parametrize("as_json", [False, True])
def test_tools_and_their_calls_reach_the_template_and_the_calls_are_supervised(as_json: bool) -> None:
    tokenizer = byte_tokenizer(CALLING)
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": CALL},
             {"role": "tool", "content": "4"}, SAID]  # fmt: skip
    row = {"messages": turns, "tools": json.dumps(TOOLS) if as_json else TOOLS}
    text, said = encoded(row, tokenizer)
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>'
    assert '"description": "adds"' in text
    assert "None" not in text
    assert said == [call, "Yes.<|im_end|>"]
    turns[1] = {**turns[1], "content": "Let me add."}
    assert encoded(row, tokenizer)[1] == [f"Let me add.\n{call}", "Yes.<|im_end|>"]


@pytest.mark.parametrize(
    ("row", "template", "lost"),
    [
        ({"messages": [USER, SAID], "tools": TOOLS}, CHATML, "the tools of this chat"),
        (
            {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": CALL}]},
            CHATML,
            "the tool_calls of a message",
        ),
        (
            {"messages": [USER, {"role": "tool", "content": "4"}, SAID]},
            "{% for m in messages %}{% if m.role != 'tool' %}{{ m.content }}{% endif %}{% endfor %}",
            "a turn of the tool",
        ),
        (
            {"messages": [{"role": "system", "content": "i"}, USER, SAID]},
            "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}",
            "a turn of the system",
        ),
        (
            {"messages": [USER, SAID]},
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
            "a turn of the assistant",
        ),
    ],
)
def test_what_a_template_passes_over_is_refused_by_name(
    row: dict[str, Any], template: str, lost: str
) -> None:
    with pytest.raises(ConfigError, match=rf"row 1: the chat template passes over {lost}"):
        encoded(row, byte_tokenizer(template), supervise="all")


def test_thoughts_beside_the_content_are_the_assistants_own() -> None:
    template = CHATML.replace("{{ m.content }}", THOUGHT + "{{ m.content }}")
    row = {"messages": [USER, {**SAID, "reasoning_content": "so"}]}
    assert encoded(row, byte_tokenizer(template))[1] == ["<think>\nso\n</think>\nYes.<|im_end|>"]


# ---------------------------------------------------------------------- turns


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MISTRAL])
@pytest.mark.parametrize("name", ["assistant", "gpt", "chatgpt", "bard", "model", "bot", "GPT", "Assistant"])
def test_the_assistant_is_supervised_by_whatever_name(name: str, template: str) -> None:
    tokenizer = byte_tokenizer(template)
    turns = [{"from": "human", "value": "Hi?"}, {"from": name, "value": "Yes."}]
    assert encoded({"conversations": turns}, tokenizer) == encoded({"messages": [USER, SAID]}, tokenizer)
    assert "Yes." in encoded({"conversations": turns}, tokenizer)[1][0]


@pytest.mark.parametrize("name", ["tutor", "narrator", "function_call", "", 7])
def test_an_unknown_role_is_refused_by_name_or_given_a_meaning(name: Any) -> None:
    tokenizer = byte_tokenizer(CHATML)
    row = {"messages": [USER, {"role": name, "content": "Yes."}]}
    with pytest.raises(ConfigError, match=rf"row 1: the role '{name}' .*data\.columns\.roles"):
        encoded(row, tokenizer)
    if isinstance(name, str):
        meant = encoded(row, tokenizer, Columns(roles={name: "assistant"}))
        assert meant == encoded({"messages": [USER, SAID]}, tokenizer)


def test_contents_of_text_parts_are_read_and_others_refused_by_name() -> None:
    tokenizer = byte_tokenizer(CHATML)
    parts = [{"type": "text", "text": "Ye"}, {"type": "text", "text": "s."}]
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hi?"}]},
            {**SAID, "content": parts},
        ]
    }
    assert encoded(row, tokenizer) == encoded({"messages": [USER, SAID]}, tokenizer)
    seen = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    with pytest.raises(ConfigError, match=r"row 1: a message has a part of type 'image_url'"):
        encoded({"messages": [seen, SAID]}, tokenizer)


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [([USER], [SAID]), ("Hi?", [SAID]), ([USER], "Yes."), ([USER, SAID, USER], [SAID])],
)
def test_prompt_and_completion_may_be_messages_and_the_completion_is_supervised(
    prompt: Any, completion: Any
) -> None:
    tokenizer = byte_tokenizer(CHATML)
    turns = [USER, SAID, USER, SAID] if len(prompt) == 3 and isinstance(prompt, list) else [USER, SAID]
    text, said = encoded({"prompt": prompt, "completion": completion}, tokenizer)
    assert text == tokenizer.apply_chat_template(turns, tokenize=False)
    assert said == ["Yes.<|im_end|>"]


# ---------------------------------------------------------------------- special tokens, blanks


@pytest.mark.parametrize("rendered", ["abc", "<s>abc", "abc</s>", "<s>abc</s>", "<s>abc</s>\n"])
def test_text_that_brings_its_special_tokens_does_not_get_them_twice(rendered: str) -> None:
    text, _ = encoded({"text": rendered}, byte_tokenizer(), bos=True, supervise="all")
    assert text.rstrip() == "<s>abc</s>"


def test_an_answer_that_brings_its_end_is_supervised_with_it() -> None:
    row = {"prompt": "<s>Q", "completion": "A</s>"}
    assert encoded(row, byte_tokenizer(), bos=True) == ("<s>Q\nA</s>", ["A</s>"])


def test_columns_that_are_not_read_are_told(tmp_path: Path) -> None:
    rows = [{"text": "abc", "url": "x"}] * 9 + [{"text": "abc", "id": 7}] * 9
    loader = corpus(tmp_path, write_rows(tmp_path / "a.jsonl", rows)).loader("train", shuffle=True)
    for _ in loader:
        loader.handed()
    assert loader.statistics.unread == ("id", "url")
    assert loader.statistics.fates() == {
        "not read are the columns id, url (data.columns names those that are)"
    }
