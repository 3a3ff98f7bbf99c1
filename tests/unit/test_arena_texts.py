"""A plan of texts from files: rows are copied as asked, divergence alone is judged, no file is missing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.arena.__main__ import main
from scripts.arena.defaults import defaults
from scripts.arena.gather import gather, judgement
from scripts.arena.plan import Plan
from scripts.arena.reading import read
from scripts.arena.record import record
from scripts.arena.stages import judge
from scripts.arena.table import page
from scripts.arena.work import Work
from src.models.loading import load_model
from tests.arena import PLAN
from tests.unit.test_arena_results import written


def test_each_split_is_the_rows_it_asks_for(plan: Plan) -> None:
    rows = [json.dumps({"text": f"row {n}"}) for n in range(9)]
    Path("all.jsonl").write_text("\n".join(rows) + "\n")
    wanted = {"train": (0, 5), "validation": (5, 2), "test": (7, 99)}
    files = {split: {"path": "all.jsonl", "skip": a, "rows": n} for split, (a, n) in wanted.items()}
    del files["train"]["skip"]
    job = Work(replace(plan, data={"files": files}), Path("work")).data
    job.at.mkdir(parents=True)
    job.function(str(job.at), **job.arguments)
    for split, (first, count) in wanted.items():
        found = (job.at / f"{split}.jsonl").read_text().split("\n")
        assert [row for row in found if row] == rows[first : first + count]


def test_a_file_that_is_missing_is_named_before_anything_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"train": {"path": "$E3_SHARED/a.jsonl", "rows": 1}}
    Path("plan.yaml").write_text(yaml.safe_dump({**PLAN, "data": {"files": files}}))
    before = sorted(folder.rglob("*"))
    for value, told in ((None, "$E3_SHARED/a.jsonl"), ("elsewhere", "elsewhere/a.jsonl")):
        monkeypatch.setenv("E3_SHARED", value) if value else monkeypatch.delenv("E3_SHARED", raising=False)
        assert main(["plan.yaml"]) == 2
        assert f"tiny: there is no {told}. E3_SHARED names" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before
    assert read("plan.yaml").data["files"]["train"]["path"] == "elsewhere/a.jsonl"


def test_texts_are_judged_as_far_as_the_model_reads(teacher_dir: str, tmp_path: Path) -> None:
    path, model = tmp_path / "test.jsonl", shutil.copytree(teacher_dir, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    path.write_text(json.dumps({"text": "1 + 2 = 3 " * 200}) + "\n" + json.dumps({"text": "1 + 2"}) + "\n")
    result = judge(load_model(str(model)), str(model), str(path))
    assert "correct" not in result
    assert result["sums"]["tokens"] == [3.0, 63.0]
    assert judgement(result, result).keys() == {"kl", "agreement", "loss", "perplexity", "parameters"}
    assert judgement(result, result)["kl"] == 0.0


def test_rows_of_texts_are_compared_by_divergence_alone(plan: Plan, tmp_path: Path) -> None:
    work = Work(plan, Path("work"))
    for run in plan.runs:
        if run.ratio == 0.25:
            written(work, run, [2, 3] if run.variant == "ours" else [4, 5], "0000", 0.1 + 0.2 * run.seed)
    for file in Path("work").rglob("result.json"):
        kept: dict[str, Any] = json.loads(file.read_text())
        kept.pop("correct", None)
        file.write_text(json.dumps(kept))
    ours, tail = gather(work)
    assert ours["recovered"].keys() == ours["cut"].keys() == {"kl"}
    assert tail["difference"].keys() == {"seeds", "kl", "learned"}
    *_, line = defaults([ours, tail])
    assert line.startswith("| methods | ours | 0.2000 [")
    assert "| last layers | 0.2000 [" in line

    Path("teacher/config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 8}))
    results = record(work, plan, {("methods", "ours"), ("methods", "tail")}, [], {})
    Path("tiny.md").write_text("<!-- results -->\nkept\n<!-- /results -->\n<!-- of -->\n<!-- /of -->\n")
    page(Path("tiny.md"), results, [], "of")
    text = Path("tiny.md").read_text()
    assert "kept" in text.split("<!-- of -->")[0]
    assert "Teacher: 4 texts, perplexity" in text
    assert "| recovered | seeds | KL | KL before | agreement | KL - reference |" in text
