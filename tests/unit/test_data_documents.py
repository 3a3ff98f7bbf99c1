"""Masks: only the answer is supervised, for every way of writing one, judged on decoded text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from src.data import Columns
from src.data.documents import read_document
from src.data.encode import IGNORE, Encoder, TokenRow
from src.data.rendering import Rendering
from src.data.sources import WHERE
from src.errors import ConfigError
from tests.data_tools import (
    CHATML,
    GEMMA,
    LLAMA3,
    MISTRAL,
    THINKING,
    byte_tokenizer,
    corpus,
    texts,
    write_rows,
)

TURNS = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4.\n\nFour \u00e9\u2713"},
    {"role": "user", "content": "It is 4."},
    {"role": "assistant", "content": "the answer"},
]


def encode(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, columns: Columns | None = None, **options: Any
) -> TokenRow:
    keys = {"max_length": 999, "supervise": "answer", "too_long": "truncate", "bos": None, "eos": True}
    row, rendering = {WHERE: "a.jsonl row 1", **row}, Rendering(tokenizer)
    document = read_document(row, columns or Columns(), "\n", rendering)
    ((found,),) = Encoder(tokenizer, **{**keys, **options})([document])
    return found


def supervised(row: TokenRow, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The supervised runs of a row, decoded, special tokens included."""
    runs: list[list[int]] = [[]]
    for token, label in zip(row.ids, row.labels, strict=True):
        assert label in (token, IGNORE)
        if label == IGNORE:
            runs.append([])
        else:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize(
    ("template", "stop"),
    [(CHATML, "<|im_end|>"), (LLAMA3, "<|eot|>"), (GEMMA, "<end_of_turn>"), (MISTRAL, "</s>")],
    ids=["chatml", "llama3", "gemma", "mistral"],
)
def test_chat_supervises_what_the_assistant_says_and_its_stop(template, stop):
    tokenizer = byte_tokenizer(template)
    row = encode({"messages": TURNS}, tokenizer)
    said = [turn["content"] + stop for turn in TURNS if turn["role"] == "assistant"]
    assert [text.strip() for text in supervised(row, tokenizer)] == said
    assert tokenizer.decode(row.ids) == tokenizer.apply_chat_template(TURNS, tokenize=False)


LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def test_a_stop_after_a_space_is_supervised_too():
    """Llama 2 puts a space before it; without its stop a model would never learn to end its turn."""
    tokenizer = byte_tokenizer(LLAMA2)
    row = encode({"messages": TURNS}, tokenizer)
    assert supervised(row, tokenizer) == [f"{TURNS[1]['content']} </s>", " the answer </s>"]


def test_a_special_token_behind_text_of_the_template_is_context():
    tokenizer = byte_tokenizer(
        CHATML.replace("{{ m.content }}<|im_end|>", "{{ m.content }} over\n<|im_end|>")
    )
    row = encode({"messages": TURNS}, tokenizer)
    assert [text.strip() for text in supervised(row, tokenizer)] == [TURNS[1]["content"], "the answer"]


def test_a_space_glued_to_the_answer_belongs_to_it():
    """After '[/INST]' the template's space and the answer's first letter are one token."""
    tokenizer = byte_tokenizer(MISTRAL)
    row = encode({"messages": TURNS}, tokenizer)
    assert supervised(row, tokenizer)[1] == " the answer</s>"


def test_blanks_that_a_template_strips_are_not_supervised():
    tokenizer = byte_tokenizer(LLAMA3)
    turns = [TURNS[0], {"role": "assistant", "content": "\n yes \n"}]
    assert supervised(encode({"messages": turns}, tokenizer), tokenizer) == ["yes<|eot|>"]


def test_reasoning_is_the_assistants_own():
    tokenizer = byte_tokenizer(THINKING)
    thought = "<think>\n2 + 2\n</think>\n\n4"
    turns = [TURNS[0], {"role": "assistant", "content": thought}] * 2
    row = encode({"messages": turns}, tokenizer)
    # the template keeps the thoughts of the last turn only
    assert supervised(row, tokenizer) == ["4<|im_end|>", thought + "<|im_end|>"]


def test_an_empty_thought_that_the_template_adds_is_not_supervised():
    tokenizer = byte_tokenizer(THINKING)
    row = encode({"messages": TURNS[:2]}, tokenizer)
    assert "<think>" in tokenizer.decode(row.ids)
    assert supervised(row, tokenizer) == [TURNS[1]["content"] + "<|im_end|>"]


def test_sharegpt_names_are_understood():
    tokenizer = byte_tokenizer(CHATML)
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    assert supervised(encode({"conversations": turns}, tokenizer), tokenizer) == ["hello<|im_end|>"]


def test_supervising_all_of_a_chat_includes_its_template():
    tokenizer = byte_tokenizer(CHATML)
    row = encode({"messages": TURNS}, tokenizer, supervise="all")
    assert row.labels == row.ids


REWRITES = "{% for m in messages %}{{ m.content | upper }}{{ m.content | length }}{% endfor %}"


def test_a_template_that_rewrites_is_refused_unless_all_is_supervised():
    tokenizer = byte_tokenizer(REWRITES)
    with pytest.raises(ConfigError, match=r"a\.jsonl row 1: the chat template rewrites"):
        encode({"messages": TURNS}, tokenizer)
    assert encode({"messages": TURNS}, tokenizer, supervise="all").ids


@pytest.mark.parametrize(
    ("messages", "template", "message"),
    [
        (TURNS, None, "has no chat template"),
        ("hello", CHATML, "the chat is str; expected a list of messages"),
        (["hello"], CHATML, "a message is str, not an object"),
        ([{"role": "user"}], CHATML, "a message has role; expected 'role' and 'content'"),
        ([{"role": "user", "content": 3}], CHATML, "a message's content holds int '3'"),
        ([{"role": "system", "content": "x"}], GEMMA, "the chat template refuses this chat: no system role"),
    ],
)
def test_chats_at_fault_name_file_and_row(messages, template, message):
    with pytest.raises(ConfigError, match=rf"a\.jsonl row 1.*{message}"):
        encode({"messages": messages}, byte_tokenizer(template))


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Q?", "answer": "step\n#### 7"},
        {"prompt": "Q?", "completion": "step\n#### 7"},
        {"instruction": "Q?", "output": "step\n#### 7", "text": "not this"},
    ],
)
def test_prompt_and_answer(row):
    tokenizer = byte_tokenizer()
    found = encode(row, tokenizer)
    assert tokenizer.decode(found.ids) == "Q?\nstep\n#### 7</s>"
    assert supervised(found, tokenizer) == ["step\n#### 7</s>"]
    assert encode(row, tokenizer, supervise="all").labels == found.ids


def test_named_columns_win_over_well_known_ones():
    tokenizer = byte_tokenizer()
    row = {"text": "no", "q": "a", "a": "b"}
    assert tokenizer.decode(encode(row, tokenizer, Columns(prompt="q", answer="a")).ids) == "a\nb</s>"
    assert tokenizer.decode(encode(row, tokenizer, Columns(text="q")).ids) == "a</s>"


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (True, False), (False, True), (False, False)])
def test_bos_and_eos(bos, eos):
    tokenizer = byte_tokenizer()
    row = encode({"text": "abc"}, tokenizer, bos=bos, eos=eos)
    assert tokenizer.decode(row.ids) == "<s>" * bos + "abc" + "</s>" * eos
    assert supervised(row, tokenizer) == ["abc" + "</s>" * eos]


def test_a_missing_special_token_is_named():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=r"data\.eos: .* has no EOS token; set data\.eos to false"):
        encode({"text": "abc"}, tokenizer)


@pytest.mark.parametrize("packing", ["padded", "documents"])
def test_a_tokenizer_without_eos_and_padding_pads_nevertheless(tmp_path, packing):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = write_rows(tmp_path / "a.jsonl", [{"text": "ab"}, {"text": "abcd"}] * 8)
    data = corpus(tmp_path, path, eos=False, packing=packing)
    assert sorted(texts(data, data.loader("train", shuffle=False))) == ["ab"] * 8 + ["abcd"] * 8


SHARED = os.environ.get("E3_SHARED", "")


@pytest.mark.skipif(not SHARED, reason="E3_SHARED does not name a directory of real tokenizers and corpora")
@pytest.mark.parametrize("model", ["stories260k"])
def test_a_real_tokenizer_that_adds_spaces(model):
    """Sentence pieces put a blank before each text: the answer must not gain one."""
    tokenizer = AutoTokenizer.from_pretrained(Path(SHARED) / "models" / model)
    row = encode({"question": "Who?", "answer": "Lily\nand Tom."}, tokenizer)
    assert row.ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(row.ids, skip_special_tokens=True) == "Who?\nLily\nand Tom."
    assert supervised(row, tokenizer) == [f"Lily\nand Tom.{tokenizer.eos_token}"]
