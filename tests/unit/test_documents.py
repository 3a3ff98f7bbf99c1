"""Texts that a model writes without prompts: where they begin, that no two seeds share one, none is empty."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from src.data.columns import Columns
from src.errors import ConfigError
from src.generate import verb
from src.generate.prompts import Prompt, Prompts
from src.generate.verb import main


def wrote(teacher: str, out: Path, *more: str) -> list[dict[str, Any]]:
    asked = ["--model", teacher, "--out", str(out), "--temperature", "1", "--batch-size", "2", *more]
    main([*asked, "--max-new-tokens", "12", "--device", "cpu", "--force"])
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_a_text_begins_behind_the_token_that_begins_or_else_ends_one(teacher_dir: str) -> None:
    """The tokenizer's word goes before the config's."""
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    ends = tokenizer.eos_token
    one, two, end = tokenizer(f"12{ends}", add_special_tokens=False).input_ids
    for bos, config, eos, wanted in (("1", two, ends, one), (None, two, ends, two), (None, None, ends, end)):
        tokenizer.bos_token, tokenizer.eos_token = bos, eos
        prompt, *others = Prompts(tokenizer, Columns(), 3, config).documents(5)
        assert prompt.ids == [wanted]
        assert others == [prompt] * 4
    assert prompt.row(tokenizer("1 + 2", add_special_tokens=False).input_ids) == {"text": "1 + 2"}
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="--documents: the tokenizer has no token that begins or ends"):
        Prompts(tokenizer, Columns(), 3).documents(1)


def test_what_the_config_says_begins_a_text_stands_before_it(
    teacher_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer of chats names no such token, and its end of a turn begins none."""
    model, told = AutoModelForCausalLM.from_pretrained(teacher_dir), list[Prompt]()
    model.config.bos_token_id = 5
    model.save_pretrained(tmp_path / "chats")
    AutoTokenizer.from_pretrained(teacher_dir).save_pretrained(tmp_path / "chats")
    real = verb.written

    def seen(model: Any, stop: Any, prompts: list[Prompt], *rest: Any) -> Any:
        told.extend(prompts)
        return real(model, stop, prompts, *rest)

    monkeypatch.setattr(verb, "written", seen)
    wrote(str(tmp_path / "chats"), tmp_path / "own.jsonl", "--documents", "2")
    assert [prompt.ids for prompt in told] == [[5], [5]]


def test_no_two_seeds_numbers_or_parts_write_the_same(teacher_dir: str, tmp_path: Path) -> None:
    first = wrote(teacher_dir, tmp_path / "a.jsonl", "--documents", "8")
    assert wrote(teacher_dir, tmp_path / "b.jsonl", "--documents", "8") == first
    texts = [row["text"] for row in first]
    assert [set(row) for row in first] == [{"text"}] * 8
    for more in (("4", "--seed", "1"), ("8", "--part", "0/2"), ("8", "--part", "1/2")):
        texts += [row["text"] for row in wrote(teacher_dir, tmp_path / "c.jsonl", "--documents", *more)]
    assert len(texts) == 20
    assert len({*texts}) == 20


def test_texts_of_nothing_are_left_out(
    teacher_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = iter(["", "a", " \n", "b", "", ""])
    monkeypatch.setattr(
        verb,
        "written",
        lambda m, s, prompts, *_: [
            {"row": {"text": next(said)}, "tokens": 1, "finished": True} for _ in prompts
        ],
    )
    assert wrote(teacher_dir, tmp_path / "a.jsonl", "--documents", "4") == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(ConfigError, match="--documents: the model says nothing in 2 tries"):
        wrote(teacher_dir, tmp_path / "b.jsonl", "--documents", "2")


def test_texts_that_would_all_be_the_same_are_refused(teacher_dir: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--documents: all would be the same at --temperature 0"):
        main(["--model", teacher_dir, "--documents", "7", "--out", str(tmp_path / "own.jsonl")])
