"""Small corpora and tokenizers for the tests of the data."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from src.data import Corpus

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{{ '<s>' if loop.first else '' }}<|start|>{{ m.role }}<|end_header|>\n\n"
    "{{ m.content | trim }}<|eot|>{% endfor %}"
)
GEMMA = (
    "<s>{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %} [INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
THINKING = (  # thoughts are kept in the last turn and dropped from the earlier ones
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and '</think>' in m.content %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set answer = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ answer }}"
    "{% elif m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{{ m.content }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end_header|>", "<|eot|>"]
SPECIAL += ["<start_of_turn>", "<end_of_turn>"]
USER, SAID = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}}]
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]
CALLING = (  # as Qwen's
    "{% if tools %}<|im_start|>system\n"
    "{% for t in tools %}{{ t | tojson }}{{ '\n' }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '\n' if m.content or not loop.first else '' }}<tool_call>\n{{ c.function | tojson }}\n</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
)


def byte_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """A lossless byte-level tokenizer, in which a space sticks to the letter after it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("\u0120", letter) for letter in "abcdefghijklmnopqrstuvwxyz"]
    pieces = [*SPECIAL, *alphabet, *("".join(pair) for pair in merges)]
    core = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=SPECIAL[3:],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


def write_rows(path: Path, rows: Iterable[Any]) -> str:
    """Write JSONL; returns the path as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(count: int, start: int = 0) -> list[dict[str, str]]:
    """Rows of text of many lengths, each with its number."""
    return [{"text": f"{start + i}:" + "x" * (i * 7 % 23)} for i in range(count)]


def corpus(tmp_path: Path, train: Any, template: str | None = None, **options: Any) -> Corpus:
    """A corpus with the byte tokenizer."""
    folder = tmp_path / "tokenizer"
    if not folder.exists():
        byte_tokenizer(template).save_pretrained(folder)
    return Corpus(str(folder), train, **{"batch_size": 4, "max_length": 64, "shuffle_buffer": 64, **options})


def texts(corpus: Corpus, batches: Iterable[dict[str, Any]]) -> list[str]:
    """The documents of batches as text, without special tokens."""
    found = []
    for batch in batches:
        for row, ids in enumerate(batch["input_ids"]):
            if "attention_mask" in batch:
                pieces = [ids[batch["attention_mask"][row].bool()]]
            else:
                starts = (batch["position_ids"][row] == 0).nonzero().flatten().tolist()
                ends = [*starts[1:], len(ids)]
                pieces = [ids[a:b] for a, b in zip(starts, ends, strict=True)]
            decoded = [corpus.tokenizer.decode(piece, skip_special_tokens=True) for piece in pieces]
            found += [text for text in decoded if text]
    return found


def read(tmp_path: Path, train: Any, **options: Any) -> list[str]:
    data = corpus(tmp_path, train, **options)
    return texts(data, data.loader("train", shuffle=True, workers=options.get("num_workers", 0)))


def arrow_compress(codec: str, content: bytes) -> bytes:
    """Two frames, one after the other, as tools that work in parallel write them."""
    frames = pa.BufferOutputStream()
    for part in (content[:999], content[999:]):
        with pa.BufferOutputStream() as frame:
            with pa.CompressedOutputStream(frame, codec) as stream:
                stream.write(part)
            frames.write(frame.getvalue())
    return frames.getvalue().to_pybytes()
