"""Whatever the models are called and however they were judged, there is a report; or one message."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from src.cli import main
from src.files import write_json
from src.mask import Mask
from src.report.verb import distinct

NAMES = {
    "one base name": ["runs/a/recovered", "runs/b/recovered"],
    "one path": ["runs/a", "runs/a"],
    "the teacher's name": ["runs/teacher"],
    "keys of the record": ["models", "tokens", "seconds", "commit", "num_layers", "name", "kl"],
    "mathematics": ["$x_{", "a$b$c", "\\frac{", "x^^y$"],
    "markup": ["[/bold]", "[red]x", "<b>&amp;", ":smile:"],
    "tables": ["a|b", "|", "`a`", "*a*_b_"],
    "controls": ["a\x00b", "a\nb", "\x1b[31m", "\ud800", "a\u202eb"],
    "long": ["x" * 250, "y" * 250],
    "no name": ["", "/", ".", ".."],
    "scripts": ["模型", "نموذج", "модель", "🦙"],
}


def judged(path: str, **figures: Any) -> dict[str, Any]:
    return {"path": path, "layers": 4, "parameters": 1000, "loss": 1.0, "perplexity": 2.7} | figures


def write_run(run: Path, teacher: dict[str, Any], models: list[dict[str, Any]], **more: Any) -> None:
    facts = {"device": "cpu", "dtype": "float32", "threads": 1, "torch": "2", "prompts": [], "seconds": 1.0}
    write_json(run / "evaluate.json", facts | {"teacher": teacher, "models": models} | more)
    Mask("parent", 6, (0, 1, 3, 5), "Random").save(run / "search/mask.json")


def report(run: Path) -> dict[str, Any]:
    main(["report", "--run", str(run)])
    for figure in (run / "figures").glob("*.svg"):
        ElementTree.parse(figure)
    return json.loads((run / "report.json").read_text())


def speeds(path: str, ratio: float) -> dict[str, Any]:
    phase = {"tokens_per_s": 5.0, "iqr": [4, 6], "speedup": ratio, "speedup_iqr": [ratio] * 2, "ideal": 1.5}
    return {"path": path, "batch_size": 1, "prefill": phase, "decode": phase}


@pytest.mark.parametrize("kind", NAMES)
def test_any_names_are_told_apart(tmp_path: Path, kind: str) -> None:
    paths = NAMES[kind]
    models = [judged(path, kl=0.1 * at, agreement=0.5, samples=["t"]) for at, path in enumerate(paths, 1)]
    write_run(tmp_path, judged("T", kl=0.0, agreement=1.0, samples=["t"]), models, prompts=["p"])
    measured = [speeds("T", 1.0), *(speeds(path, 1.0 + at) for at, path in enumerate(paths, 1))]
    write_json(tmp_path / "benchmark.json", {"baseline": {"path": "T"}, "measured": measured})
    found = report(tmp_path)["models"]
    assert [model["kl"] for model in found] == [0.0, *(0.1 * at for at in range(1, len(paths) + 1))]
    assert [model["path"] for model in found] == ["T", *paths]
    names = [model["name"] for model in found]
    assert len(set(names)) == len(names)
    page = (tmp_path / "report.html").read_text()
    assert all(f"<td>{escape(name)}</td>" in page for name in names if name != "cut")
    table = [line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in table} == {len(names) + 2}


def test_names_are_as_short_as_can_be() -> None:
    assert distinct(["runs/a/cut", "runs/a/recovered"]) == ["cut", "recovered"]
    assert distinct(["runs/a/recovered", "runs/b/recovered"]) == ["a/recovered", "b/recovered"]
    assert distinct(["runs/teacher", "cut"]) == ["runs/teacher", "cut"]


def test_speeds_go_to_the_path_that_was_measured(tmp_path: Path) -> None:
    write_run(tmp_path, judged("T", kl=0.0), [judged("a/recovered", kl=0.1), judged("b/recovered", kl=0.2)])
    measured = [speeds("T", 1.0), speeds("b/recovered", 2.0)]
    write_json(tmp_path / "benchmark.json", {"baseline": {"path": "T"}, "measured": measured})
    first, second = report(tmp_path)["models"][1:]
    assert "decode" not in first
    assert second["decode"]["speedup"] == 2.0


def test_scores_of_tasks_are_rows(tmp_path: Path) -> None:
    def scores(*ratio: float) -> dict[str, Any]:
        return {"piqa": {"acc": {"score": 0.7} | ({"ratio": ratio[0]} if ratio else {})}}

    teacher = {"path": "T", "parameters": 9, "layers": 4, "tasks": scores()}
    student = {"path": "S", "parameters": 7, "layers": 3, "tasks": scores(0.9)}
    write_run(tmp_path, teacher, [student], tasks={"piqa": {"shots": 0}})
    assert report(tmp_path)["models"][1]["tasks"]["piqa"]["acc"]["ratio"] == 0.9
    assert "| piqa, acc | 0.7 | 0.7  (0.9x) |" in (tmp_path / "report.md").read_text()


def test_scores_of_a_judgement_of_their_own_go_to_the_path_that_was_judged(tmp_path: Path) -> None:
    """``tasks.json`` beside ``evaluate.json``: a row where a model was asked, a dash where not."""
    write_run(tmp_path, judged("T", kl=0.0), [judged("a/cut", kl=0.1), judged("a/recovered", kl=0.2)])
    asked = [
        {"path": path, "tasks": {"piqa": {"acc": {"score": score}}}}
        for path, score in (("T", 0.7), ("a/recovered", 0.6))
    ]
    write_json(tmp_path / "tasks.json", {"teacher": asked[0], "models": asked[1:]})
    assert ["tasks" in model for model in report(tmp_path)["models"]] == [True, False, True]
    assert "| piqa, acc | 0.7 | - | 0.6 |" in (tmp_path / "report.md").read_text()


BROKEN = {
    "a list": "[]",
    "a number": "3",
    "not a number": '{"teacher": {"path": "T", "kl": NaN}, "models": [{}]}',
    "endless": '{"teacher": {"path": "T", "kl": -Infinity}, "models": [{}]}',
    "deep": "[" * 100_000,
    "half": '{"teacher": {',
    "no models": '{"teacher": {"path": "T"}, "models": []}',
    "text as teacher": '{"teacher": "T", "models": [{"path": "S"}]}',
    "text as models": '{"teacher": {"path": "T"}, "models": "S"}',
    "no path": '{"teacher": {"path": "T"}, "models": [{"kl": 1}]}',
    "figures as text": '{"teacher": {"path": "T", "kl": "x"}, "models": [{"path": "S", "kl": "x"}]}',
    "binary": "\x00\x01",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_no_record_is_one_message(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    Mask("parent", 6, (0, 1, 3, 5), "Random").save(tmp_path / "search/mask.json")
    (tmp_path / "evaluate.json").write_text(BROKEN[kind])
    with pytest.raises(SystemExit) as stop:
        main(["report", "--run", str(tmp_path)])
    assert stop.value.code == 2
    assert "evaluate" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"search", "evaluate.json"}


def test_a_benchmark_beside_another_baseline_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, judged("T", kl=0.0), [judged("S", kl=0.1)])
    write_json(tmp_path / "benchmark.json", {"baseline": {"path": "U"}, "measured": [speeds("U", 1.0)]})
    with pytest.raises(SystemExit):
        main(["report", "--run", str(tmp_path)])
