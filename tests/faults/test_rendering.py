"""A row reads the same in every run: neither day nor chance nor an edited template moves a row unsaid."""

from __future__ import annotations

import datetime
import json
import random
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from src.cache import Cache
from src.cli import main
from src.data import Corpus, row_ids
from src.data.rendering import Rendering
from src.errors import ConfigError
from tests.data_tools import byte_tokenizer, corpus, texts, write_rows
from tests.tiny import tiny_model

TODAY = (
    "{% if strftime_now is defined %}Today is {{ strftime_now('%d %B %Y, %H:%M') }}. {% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
LOTS = "{{ ['Hi', 'Hello', 'Welcome', 'Good day'] | random }}. " + TODAY
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"question {i}"},
            {"role": "assistant", "content": "x" * (i % 7)},
        ]
    }
    for i in range(112)
]


def clock(monkeypatch: pytest.MonkeyPatch, day: str) -> None:
    """Let it be noon of a day, for the library that renders and for this product."""
    noon = datetime.datetime.fromisoformat(f"{day}T12:00")

    class Moment(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return noon

    class Day(datetime.date):
        @classmethod
        def today(cls) -> Any:
            return noon.date()

    monkeypatch.setattr(chat_template_utils, "datetime", Moment)
    monkeypatch.setattr("src.data.rendering.date", Day)


def sides(tmp_path: Path, path: str, **options: Any) -> list[set[str]]:
    """The questions on both sides of the held-out split."""
    data = corpus(tmp_path, path, held_out=0.3, max_length=128, **options)
    loaders = [data.loader("train", shuffle=False), data.loader("validation", shuffle=False)]
    return [{re.findall(r"question (\d+)", text)[0] for text in texts(data, loader)} for loader in loaders]


@pytest.mark.parametrize("template", [TODAY, LOTS], ids=["date", "chance"])
def test_no_row_changes_sides_overnight(tmp_path: Path, monkeypatch: Any, template: str) -> None:
    path = write_rows(tmp_path / "chats.jsonl", CHATS)
    clock(monkeypatch, "2026-11-24")
    before = sides(tmp_path, path, template=template)
    clock(monkeypatch, "2026-11-25")
    assert sides(tmp_path, path) == before
    assert len(before[1]) > 20
    assert not before[0] & before[1]


def test_no_row_changes_sides_with_the_template_or_the_separator(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "chats.jsonl", CHATS)
    before = sides(tmp_path, path, template=TODAY)
    byte_tokenizer("Be kind." + TODAY).save_pretrained(tmp_path / "tokenizer")
    assert sides(tmp_path, path) == before
    pairs = write_rows(
        tmp_path / "pairs.jsonl", [{"prompt": f"question {i}", "answer": "y"} for i in range(99)]
    )
    assert sides(tmp_path, pairs, separator="\n") == sides(tmp_path, pairs, separator="\n ")


def batches(data: Corpus, count: int) -> list[list[int]]:
    """The names of the rows of the next batches."""
    loader, found = data.train_dataloader(), []
    for batch in loader:
        loader.handed()
        found.append(row_ids(batch))
        if len(found) == count:
            break
    return found


@pytest.mark.parametrize("template", [TODAY, LOTS], ids=["date", "chance"])
def test_a_resume_overnight_goes_on_at_the_next_row(tmp_path: Path, monkeypatch: Any, template: str) -> None:
    path = write_rows(tmp_path / "chats.jsonl", CHATS)
    options: dict[str, Any] = {
        "held_out": 0.3,
        "packing": "documents",
        "max_length": 128,
        "template": template,
    }
    clock(monkeypatch, "2026-11-24")
    whole = batches(corpus(tmp_path, path, **options), 9)
    first = corpus(tmp_path, path, **options)
    assert batches(first, 4) == whole[:4]
    clock(monkeypatch, "2026-12-01")
    second = corpus(tmp_path, path, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert batches(second, 5) == whole[4:]


def test_the_day_can_be_named_and_a_new_one_is_told(tmp_path: Path, monkeypatch: Any) -> None:
    path = write_rows(tmp_path / "chats.jsonl", CHATS)
    data = corpus(tmp_path, path, template=TODAY, today="2024-02-29")
    (text, *_) = texts(data, data.loader("train", shuffle=False))
    assert "Today is 29 February 2024, 00:00." in text
    batches(data, 1)
    other = corpus(tmp_path, path, today="2024-03-01")
    with pytest.warns(UserWarning, match=r"today was 2024-02-29 in the checkpoint and is now 2024-03-01"):
        other.load_state_dict(data.state_dict())
    for wrong in ("2024-02-30", "tomorrow", ""):
        with pytest.raises(ConfigError, match=r"data\.today: .*2026-01-31"):
            corpus(tmp_path, path, today=wrong)


def test_an_edited_template_or_tokenizer_is_told_on_resume(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "chats.jsonl", CHATS)
    data = corpus(tmp_path, path, template=TODAY)
    batches(data, 2)
    saved = data.state_dict()
    tokenizer = byte_tokenizer("Be kind. " + TODAY)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.warns(UserWarning, match=r"data: the chat template .* was .* and is now"):
        corpus(tmp_path, path).load_state_dict(saved)
    rules = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())
    rules["normalizer"] = {"type": "Lowercase"}
    byte_tokenizer(TODAY).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(rules))
    with pytest.warns(UserWarning, match=r"data: the way the tokenizer divides text"):
        corpus(tmp_path, path).load_state_dict(saved)


def test_chance_in_a_template_leaves_the_runs_own_alone(tmp_path: Path) -> None:
    rendering = Rendering(byte_tokenizer(LOTS))
    random.seed(1)
    expected = random.random()
    random.seed(1)
    said = {rendering([{"role": "user", "content": "x"}], seed) for seed in map(str, range(20))}
    assert len(said) > 1
    assert random.random() == expected
    assert rendering([{"role": "user", "content": "x"}], "7") == rendering(
        [{"role": "user", "content": "x"}], "7"
    )


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A tiny model whose template prints the day."""
    tokenizer = byte_tokenizer(TODAY)
    tiny_model(
        "llama", num_hidden_layers=2, vocab_size=len(tokenizer), max_position_embeddings=128
    ).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == TODAY
    return str(tmp_path / "model")


def test_a_cache_that_was_stopped_goes_on_the_next_day(
    tmp_path: Path, model: str, monkeypatch: Any, capsys: Any
) -> None:
    path = write_rows(tmp_path / "chats.jsonl", CHATS[:40])
    arguments = ["predict", "--config", "configs/cache/topk.yaml", "--model.init_args.model", model,
                 "--model.init_args.shard_positions", "500", "--model.init_args.count_seconds", "0",
                 "--data.init_args.train", path, "--data.init_args.batch_size", "4",
                 "--trainer.accelerator", "cpu",
                 "--trainer.logger.init_args.save_dir", str(tmp_path / "logs"),
                 "--trainer.enable_progress_bar", "false", "--trainer.callbacks", "null"]  # fmt: skip
    clock(monkeypatch, "2026-11-24")
    main([*arguments, "--model.init_args.out", str(tmp_path / "whole")])
    main(
        [*arguments, "--model.init_args.out", str(tmp_path / "parts"), "--trainer.limit_predict_batches", "5"]
    )
    clock(monkeypatch, "2026-11-25")
    main([*arguments, "--model.init_args.out", str(tmp_path / "parts")])
    whole, parts = Cache(str(tmp_path / "whole")), Cache(str(tmp_path / "parts"))
    assert parts.about.day == whole.about.day == "2026-11-24"
    assert parts.corpus == whole.corpus
    with pytest.raises(SystemExit, match="2"):
        main(
            [
                *arguments,
                "--model.init_args.out",
                str(tmp_path / "parts"),
                "--data.init_args.today",
                "2026-11-25",
            ]
        )
    assert "day was 2026-11-24 and is now 2026-11-25" in capsys.readouterr().err
