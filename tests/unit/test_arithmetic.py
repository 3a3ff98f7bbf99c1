"""The embedded task: worked solutions are right, splits are disjoint, the tokenizer loses nothing."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from src.data import arithmetic
from src.data.arithmetic import (
    MAX_TOTAL,
    SPLITS,
    build_tokenizer,
    final_answer,
    problems,
    split_of,
    write_splits,
)


def test_worked_solutions_are_right_and_end_in_the_answer() -> None:
    operations = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    for row in problems("train", 500, 0):
        lines = re.findall(r"(\d+) ([+*-]) (\d+) = (\d+)\.", row["answer"])
        assert 2 <= len(lines) <= 8
        for left, operation, right, result in lines:
            assert operations[operation](int(left), int(right)) == int(result)
            assert 0 <= int(result) < MAX_TOTAL
        assert final_answer(row["answer"]) == lines[-1][3]


def test_harder_tiers_have_as_many_operations_as_asked_and_stay_in_their_splits() -> None:
    for row in problems("test", 100, 0, steps=(5, 6)):
        sentences = row["question"].count(".") - 1  # the first says what there is
        lines = row["answer"].count("=")
        boxes = len(re.findall(r" boxes of ", row["question"]))
        assert 5 <= sentences <= 6
        assert lines == sentences + boxes, "an operation with boxes takes two lines"
        assert split_of(row) == "test"


def test_the_command_tells_what_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--train", "3", "--validation", "2", "--test", "1"]
    monkeypatch.setattr(sys, "argv", ["arithmetic", "--out", str(tmp_path), *sizes])
    arithmetic.main()
    assert capsys.readouterr().out == f"problems: 3 train, 2 validation, 1 test -> {tmp_path}\n"
    assert [len((tmp_path / f"{part}.jsonl").read_text().splitlines()) for part in SPLITS] == [3, 2, 1]


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [("--train", "-5", "'-5' given; accepted: a whole number"), ("--out", "/dev/null/x", "cannot write")],
)
def test_what_cannot_be_written_is_one_message(
    option: str, value: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = ["arithmetic", "--out", str(tmp_path / "x"), "--train=1", "--validation=1", "--test=1"]
    monkeypatch.setattr(sys, "argv", [*given, f"{option}={value}"])
    with pytest.raises(SystemExit) as stop:
        arithmetic.main()
    assert stop.value.code == 2
    assert re.search(f"error: .*{option}: .*{told}", capsys.readouterr().err)
    assert not (tmp_path / "x").exists()


def test_seeds_reproduce_and_differ() -> None:
    assert list(problems("test", 20, 3)) == list(problems("test", 20, 3))
    assert list(problems("test", 20, 3)) != list(problems("test", 20, 4))


def test_splits_are_disjoint_by_construction(tmp_path) -> None:  # type: ignore[no-untyped-def]
    found = {
        split: {row["question"] for row in problems(split, 200, 0)}
        for split in ("train", "validation", "test")
    }
    for split, questions in found.items():
        assert all(split_of({"question": q}) == split for q in questions)
    write_splits(tmp_path, {"train": 30, "validation": 10, "test": 10})
    assert {p.name for p in tmp_path.iterdir()} == {"train.jsonl", "validation.jsonl", "test.jsonl"}


def test_tokenizer_is_lossless_and_splits_digits() -> None:
    tokenizer = build_tokenizer()
    for row in problems("validation", 100, 1):
        text = row["question"] + "\n" + row["answer"]
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids
        assert not any(re.search(r"\d\d", piece) for piece in tokenizer.convert_ids_to_tokens(ids))


def test_final_answer_reads_gsm8k_style() -> None:
    assert final_answer("work #### 1,234") == "1234"
    assert final_answer("#### 3 then #### -4") == "-4"
    assert final_answer("no answer 5") is None
