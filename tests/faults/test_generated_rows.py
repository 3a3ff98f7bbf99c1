"""Rows that a model writes: neither its checkpoint, its tokenizer nor its table of positions changes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from src.data.columns import Columns
from src.data.formats import WHERE
from src.errors import ConfigError
from src.evaluate.generate import greedy
from src.generate import verb
from src.generate.prompts import Prompts
from src.generate.verb import main
from tests.faults.runs import ended
from tests.tiny import tiny_model

WORDS = [f"\u2581{word}" for word in ("one", "two", "three", "and", "is", "plus", "five", "six", "ten")]
NEW = 5


def spaced() -> PreTrainedTokenizerFast:
    """A tokenizer that writes a space into the word behind it, and drops the first one of a text."""
    vocabulary = {word: n for n, word in enumerate(["<unk>", "</s>", "\n", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    lines = pre_tokenizers.Split("\n", "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), lines])
    core.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")


def wrote(model: Path | str, rows: Path, *more: str) -> list[dict[str, Any]]:
    """The rows that the command writes."""
    out = rows.with_suffix(".own")
    out.unlink(missing_ok=True)
    short = ("--max-new-tokens", str(NEW), "--batch-size", "2", "--device", "cpu", "--force")
    main(["--model", str(model), "--prompts", str(rows), "--out", str(out), *short, *more])
    return [json.loads(line) for line in out.read_text().splitlines()]


def listed(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("setting", "heat"),
    [
        ({"repetition_penalty": 5.0, "suppress_tokens": list(range(5, 40))}, ()),
        ({"num_beams": 2, "min_new_tokens": NEW}, ()),
        (
            {"no_repeat_ngram_size": 1, "do_sample": True, "min_p": 0.5},
            ("--temperature", "1.0", "--seed", "3"),
        ),
    ],
    ids=["penalties", "beams", "drawn"],
)
def test_the_checkpoints_own_sampling_settings_change_nothing(
    setting: dict[str, Any], heat: tuple[str, ...], teacher_dir: str, corpus_file: str, tmp_path: Path
) -> None:
    """Each of these joins what generate() of transformers is asked for."""
    model = AutoModelForCausalLM.from_pretrained(teacher_dir)
    for key, value in setting.items():
        setattr(model.generation_config, key, value)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(teacher_dir).save_pretrained(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(Path(corpus_file).read_text().splitlines(keepends=True)[:4]))
    assert wrote(tmp_path / "model", rows, *heat) == wrote(teacher_dir, rows, *heat)


@pytest.mark.parametrize("kind", ["text", "question"])
def test_a_row_has_the_tokens_that_the_model_wrote(kind: str, tmp_path: Path) -> None:
    """Read again, it is the prompt and the continuation: no space is lost where the two meet."""
    tokenizer = spaced()
    model = tiny_model("llama", 12, vocab_size=len(tokenizer), eos_token_id=1, pad_token_id=1)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    said = "one plus two and five is six"
    rows = {"text": {"text": said}, "question": {"question": said, "answer": "ten"}}
    (row,) = wrote(tmp_path / "model", listed(tmp_path / "rows.jsonl", rows[kind]), "--start", "3")
    given = tokenizer(said).input_ids[:3] if kind == "text" else tokenizer(f"{said}\n").input_ids
    ((*new,),) = greedy(model, [given], NEW, frozenset({1}))
    assert len(new) == NEW
    text = row["text"] if kind == "text" else f"{row['prompt']}\n{row['completion']}"
    assert text == tokenizer.decode([*given, *new])
    assert text.endswith("".join(tokenizer.convert_ids_to_tokens(new)).replace("\u2581", " "))


def test_the_words_of_a_chat_begin_without_a_space() -> None:
    """A template puts its own in front of them."""
    tokenizer = spaced()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    turns = [{"role": "user", "content": "one plus two"}]
    (prompt,) = Prompts(tokenizer, Columns(), 3)([{WHERE: "row 1", "messages": turns}])
    new = tokenizer("is three").input_ids
    assert prompt.row(new) == {"messages": [*turns, {"role": "assistant", "content": "is three"}]}


@pytest.fixture
def tabled(teacher_dir: str, tmp_path: Path) -> Path:
    """A model with a table of 24 positions."""
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    sizes = {"n_positions": 24, "max_position_embeddings": 24, "vocab_size": len(tokenizer)}
    tiny_model("gpt2", eos_token_id=1, **sizes).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_prompt_beyond_the_table_is_told_before_anything_is_written(
    tabled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It stands in the last batch, which comes after hours of others."""
    monkeypatch.setattr(verb, "load", lambda *_: pytest.fail("the model is loaded"))
    short, long = ({"question": " 1" * count, "answer": "1"} for count in (5, 40))
    rows, out = listed(tmp_path / "rows.jsonl", short, short, long), tmp_path / "own.jsonl"
    assert ended(["generate", "--model", str(tabled), "--prompts", str(rows), "--out", str(out)]) == 2
    assert "more than the 24 places in the table of positions" in capsys.readouterr().err.replace("\n", " ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "rows.jsonl"]


def test_near_the_end_of_the_table_a_row_gets_the_tokens_that_have_a_place(
    tabled: Path, tmp_path: Path
) -> None:
    rows = listed(tmp_path / "rows.jsonl", {"question": " 1" * 20, "answer": "1"})
    wrote(tabled, rows)
    record = json.loads(rows.with_name("rows.own.record.json").read_text())
    given = len(AutoTokenizer.from_pretrained(tabled)(" 1" * 20 + "\n").input_ids)
    assert record["tokens"] == 24 - given + 1 < NEW  # the last one is not fed
    assert record["unfinished"] == 1


def test_a_row_without_a_first_token_is_refused_by_its_number(teacher_dir: str, tmp_path: Path) -> None:
    rows = listed(tmp_path / "rows.jsonl", {"text": " 1 2 3"}, {"text": ""})
    with pytest.raises(ConfigError, match=r"rows\.jsonl row 2: the text is empty"):
        wrote(teacher_dir, rows)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_model_that_cannot_be_loaded_leaves_nothing_behind(
    teacher_dir: str, corpus_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", teacher_dir, "--prompts", corpus_file, "--out", str(tmp_path / "own.jsonl")]
    assert ended(["generate", *given, "--device", "0.5"]) == 2
    assert capsys.readouterr().err.count("error:") == 1
    assert not [*tmp_path.iterdir()]
