"""Commands that read rows count those that they leave out, and name the columns that they do not read."""

from __future__ import annotations

import json
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedTokenizerBase

from src.cli import main
from src.data import Columns
from src.data.arithmetic import build_tokenizer, problems
from src.data.documents import read_document
from src.data.encode import IGNORE, Encoder
from src.data.judging import judged
from src.data.rendering import Rendering
from src.data.sources import WHERE
from tests.data_tools import CALL, CALLING, CHATML, SAID, TOOLS, USER, byte_tokenizer, corpus, write_rows
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer()
    keys: dict[str, Any] = {"num_hidden_layers": 3, "max_position_embeddings": 512, "eos_token_id": 1}
    tiny_model("llama", vocab_size=len(tokenizer), **keys).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def evaluated(model: str, rows: str, out: Path, *more: str) -> dict[str, Any]:
    main(["evaluate", "--teacher", model, "--model", model, "--data", rows, "--out", str(out), *more])
    return dict(json.loads(out.read_text()))


def test_all_figures_are_of_the_rows_that_are_counted(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    short = [{**row, "id": 7} for row in problems("test", 8, 0)]
    long = [{**row, "question": row["question"] + " Hm." * 200} for row in problems("test", 5, 1)]
    mixed = [row for pair in zip_longest(long, short) for row in pair if row]  # a long one comes first
    out = tmp_path / "out.json"
    few = ["--max-new-tokens", "3", "--max-length", "200"]
    found = evaluated(model, write_rows(tmp_path / "a.jsonl", mixed), out, *few)
    said = capsys.readouterr().out
    alone = evaluated(model, write_rows(tmp_path / "b.jsonl", short), out, *few)
    assert (found["rows"], found["rows_read"]) == (8, 13)
    assert found["left_out"] == {"whose prompt fills the maximal length": 5}
    assert found["columns_not_read"] == ["id"]
    assert (
        "8 of 13 rows; left out: 5 whose prompt fills the maximal length; columns not read: id"
        in " ".join(said.split())
    )
    for one, other in zip(
        [found["teacher"], *found["models"]], [alone["teacher"], *alone["models"]], strict=True
    ):
        assert len(one["correct"]) == 8
        for figure in ("tokens", "loss", "kl", "exact_match", "correct", "samples"):
            assert one[figure] == other[figure], figure


def test_rows_that_cannot_be_judged_are_counted_by_reason(tmp_path: Path, model: str) -> None:
    good = list(problems("test", 3, 0))
    rows = [good[0], {**good[1], "answer": ""}, {**good[2], "question": good[2]["question"] * 9}]
    path = write_rows(tmp_path / "a.jsonl", rows)
    cut = evaluated(
        model, path, tmp_path / "a.json", "--no-exact-match", "--max-length", "150", "--supervise", "all"
    )
    assert (cut["rows"], cut["truncated"], cut["left_out"]) == (3, 1, {})
    found = judged(build_tokenizer(), rows, Columns(), max_length=150)
    assert found.numbers[0] == 0
    assert found.left_out["whose prompt fills the maximal length"] == 1
    none = judged(build_tokenizer(), [{"text": ""}] * 2, Columns())
    assert (none.rows, none.left_out) == ([], {"with nothing to judge": 2})
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "evaluate",
                "--model",
                model,
                "--data",
                write_rows(tmp_path / "b.jsonl", rows[2:]),
                "--max-length",
                "99",
            ]
        )
    assert stop.value.code == 2


def test_evaluate_refuses_a_column_of_context_by_name_and_ignores_it_on_demand(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**row, "context": "Some eggs."} for row in problems("test", 3, 0)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(SystemExit):
        evaluated(model, path, tmp_path / "x.json")
    assert "row 1: column 'context' conditions the answer and is not read" in capsys.readouterr().err
    few = ["--max-new-tokens", "3"]
    bare = evaluated(
        model, write_rows(tmp_path / "b.jsonl", problems("test", 3, 0)), tmp_path / "b.json", *few
    )
    left = evaluated(model, path, tmp_path / "c.json", *few, "--ignore", "context")
    used = evaluated(model, path, tmp_path / "d.json", *few, "--input", "context")
    assert left["teacher"]["loss"] == bare["teacher"]["loss"] != used["teacher"]["loss"]


def test_the_preview_shows_what_is_read_and_names_what_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    byte_tokenizer(CHATML).save_pretrained(tmp_path / "model")
    turns = [{"from": "human", "value": "Hi?"}, {"from": "chatgpt", "value": "Yes."}]
    rows = [{"conversations": turns, "system": "Be terse.", "id": n} for n in range(4)]
    config = {
        "model": {"class_path": "src.search.MaskSearch", "init_args": {"model": f"{tmp_path}/model"}},
        "data": {"class_path": "src.data.Corpus", "init_args": {
            "train": write_rows(tmp_path / "a.jsonl", rows), "supervise": "answer"}},
    }  # fmt: skip
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(config))
    main(["preview", "--config", f"{tmp_path}/a.yaml", "--rows", "1"])
    said = capsys.readouterr().out
    assert "system\nBe terse." in said
    assert "{+Yes.<|im_end|>+}" in said
    assert "not read are the columns id (data.columns names those that are)" in said
    write_rows(tmp_path / "a.jsonl", [{**row, "documents": ["x"]} for row in rows])
    with pytest.raises(SystemExit) as stop:
        main(["preview", "--config", f"{tmp_path}/a.yaml"])
    assert stop.value.code == 2
    assert "column 'documents' conditions the answer" in capsys.readouterr().err
    main(["preview", "--config", f"{tmp_path}/a.yaml", "--data.columns.ignore", "[documents]", "--rows", "1"])
    assert "{+Yes.<|im_end|>+}" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_of_tools_and_parts_is_read_as_the_rows_say(tmp_path: Path, workers: int) -> None:
    """Rows of many shapes in one file, as agents' corpora have, through files and workers."""
    call = {"role": "assistant", "content": None, "tool_calls": CALL}
    rows = [
        {"messages": [USER, call, {"role": "tool", "content": "4"}, SAID], "tools": TOOLS},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi?"}]}, SAID], "tools": None},
        {"prompt": [USER], "completion": [SAID]},
    ] * 4
    data = corpus(
        tmp_path, write_rows(tmp_path / "a.jsonl", rows), CALLING, supervise="answer", max_length=400
    )
    found = list(data.loader("train", shuffle=True, workers=workers))
    assert sum(len(batch["input_ids"]) for batch in found) == 12
    supervised = sum(int((batch["labels"] != IGNORE).sum()) for batch in found)
    alone = sum(len(labels) for row in rows for labels in [_labels(row, byte_tokenizer(CALLING))])
    assert supervised == alone


def _labels(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    document = read_document({WHERE: "row", **row}, Columns(), "\n", Rendering(tokenizer))
    ((found,),) = Encoder(tokenizer, 999, "answer", "truncate", None, True)([document])
    return [label for label in found.labels if label != IGNORE]
