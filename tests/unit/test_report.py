"""The report: what it gathers, what it says when pieces are missing, and that its pages stand alone."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from src import benchmark
from src.data.arithmetic import build_tokenizer, problems
from src.data.judging import content, read_rows
from src.errors import ConfigError
from src.evaluate import verb as evaluate
from src.files import write_json
from src.generate import verb as generate
from src.mask import Mask
from src.report import answers, figures
from src.report import verb as report
from tests.pages import Cells
from tests.tiny import tiny_model

STUDENTS = ("cut", "recovered")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as the stages leave it: judged and timed by the real commands, on tiny models."""
    run = tmp_path_factory.mktemp("run")
    tokenizer = build_tokenizer()
    for seed, (name, layers) in enumerate((("teacher", 7), ("cut", 5), ("recovered", 5))):
        keys = {"vocab_size": len(tokenizer), "eos_token_id": 1, "max_position_embeddings": 256}
        tiny_model("llama", seed, num_hidden_layers=layers, **keys).save_pretrained(run / name)
        tokenizer.save_pretrained(run / name)
    rows = "".join(json.dumps(row) + "\n" for row in problems("test", 4, seed=0))
    (run / "test.jsonl").write_text(rows)
    students = [str(run / name) for name in STUDENTS]
    evaluate.main([*f"--teacher {run}/teacher --data {run}/test.jsonl --max-new-tokens 3".split(),
                   "--model", *students, "--out", f"{run}/evaluate.json"])  # fmt: skip
    benchmark.main([*f"--baseline {run}/teacher --prompt-tokens 8 --new-tokens 2 --repeats 2".split(),
                    "--model", *students, "--out", f"{run}/benchmark.json"])  # fmt: skip
    Mask(f"{run}/teacher", 7, (0, 1, 3, 5, 6), "GumbelTopK", metrics={"kl": 0.22}).save(
        run / "search/mask.json"
    )
    course = [(step, 1.0 / step) for step in range(1, 30)]
    write_json(run / "search/record.json", {"tokens": 1000, "seconds": 2.5, "history": course})
    write_json(run / "recover/record.json", {"tokens": 7000, "seconds": 20.0, "history": course})
    write_json(run / "search/gates.json", {"keep_probability": [[0.5] * 7, [0.9] * 7]})
    write_json(run / "teacher/training.json", {"tokens": 40_000, "seconds": 900.0})
    report.main(["--run", str(run)])
    return run


@pytest.fixture
def gathered(finished: Path) -> dict[str, Any]:
    return json.loads((finished / "report.json").read_text())


@pytest.fixture
def models(gathered: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {model["name"]: model for model in gathered["models"]}


def test_every_model_has_every_figure(gathered: dict[str, Any], models: dict[str, Any]) -> None:
    keys = {"exact_match", "kl", "agreement", "parameters", "prefill_tokens_per_s", "decode_tokens_per_s"}
    for name in ("teacher", *STUDENTS):
        assert keys <= set(models[name]), name
    assert list(models) == ["teacher", *STUDENTS]
    assert (models["teacher"]["kl"], models["teacher"]["agreement"]) == (0, 1)
    assert gathered["removed_layers"] == [2, 4]
    assert {"commit", "command"} <= set(gathered)


def test_costs_add_up(gathered: dict[str, Any], models: dict[str, Any]) -> None:
    assert gathered["tokens"] == {"search": 1000, "recover": 7000}
    assert gathered["teacher_training_tokens"] == models["teacher"]["tokens"] == 40_000
    assert (models["cut"]["tokens"], models["recovered"]["tokens"]) == (1000, 8000)
    assert (models["cut"]["seconds"], models["recovered"]["seconds"]) == (2.5, 22.5)
    assert {"search", "recover", "evaluate", "benchmark"} == set(gathered["seconds"])
    assert "for 20.0% of the teacher's training tokens" in report.headline(gathered)


def test_the_ideal_is_that_of_the_benchmark(
    finished: Path, gathered: dict[str, Any], models: dict[str, Any]
) -> None:
    measured = json.loads((finished / "benchmark.json").read_text())["measured"]
    assert gathered["ideal_speedup"] == measured[2]["decode"]["ideal"] > 1
    assert gathered["decode_speedup"] == measured[2]["decode"]["speedup"]
    assert "--repeats 2" in gathered["commands"]["benchmark"]
    assert models["recovered"]["decode_tokens_per_s"] == measured[2]["decode"]["tokens_per_s"]


def test_the_judged_rows_are_noted_by_what_they_hold(finished: Path) -> None:
    """Two runs that were judged by the same rows are compared row by row."""
    record = json.loads((finished / "evaluate.json").read_text())
    assert record["content"] == content(read_rows(str(finished / "test.jsonl")))


def test_the_table_is_the_same_everywhere(finished: Path, gathered: dict[str, Any]) -> None:
    rows = report.table_of(gathered)
    assert rows[0] == ["", "teacher", "cut, no recovery", "recovered"]
    record = json.loads((finished / "evaluate.json").read_text())
    samples = [model["samples"][0] for model in (record["teacher"], *record["models"])]
    rows_of_answers = ["prompt", "teacher", *STUDENTS], [record["prompts"][0], *samples]
    page = Cells()
    page.feed((finished / "report.html").read_text())
    assert page.cells == [cell for row in (*rows, *rows_of_answers) for cell in row]
    markdown = (finished / "report.md").read_text()
    assert all("| " + " | ".join(row) + " |" in markdown for row in rows)


@pytest.fixture
def asked(tmp_path: Path, finished: Path) -> Path:
    """The run, whose three models have answered the same questions."""
    shutil.copytree(finished, tmp_path / "run")
    for name in ("teacher", *STUDENTS):
        out = f"--max-new-tokens 9 --out {tmp_path}/run/answers/{name}.jsonl"
        generate.main(f"--model {finished}/{name} --prompts {finished}/test.jsonl {out}".split())
    return tmp_path / "run"


def test_what_models_wrote_stands_side_by_side(asked: Path) -> None:
    """The teacher's column comes first, as in the table; the page holds every answer to its end."""
    report.main(["--run", str(asked)])
    written = [[json.loads(line) for line in (asked / f"answers/{name}.jsonl").read_text().splitlines()]
               for name in ("teacher", *STUDENTS)]  # fmt: skip
    page = Cells()
    page.feed((asked / "report.md").read_text())
    lines = [[row[0]["prompt"], *(each["completion"] for each in row)] for row in zip(*written, strict=True)]
    assert len(lines) == 4
    assert page.cells == ["prompt", "teacher", *STUDENTS, *(cell for line in lines for cell in line)]


def test_answers_to_other_prompts_are_refused(asked: Path) -> None:
    lines = (asked / "answers/cut.jsonl").read_text().splitlines(keepends=True)
    (asked / "answers/cut.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(ConfigError, match=r"answers' answer different prompts \(cut, recovered, teacher\)"):
        report.main(["--run", str(asked)])
    (asked / "answers/cut.jsonl").write_text('{"problem": "?"}\n')
    with pytest.raises(ConfigError, match=r"not as the stages write them.*answers by generate"):
        report.main(["--run", str(asked)])


def test_chats_and_texts_are_answers_too() -> None:
    chat = [("system", "s"), ("user", "q\n?"), ("assistant", "a")]
    row = {"messages": [{"role": role, "content": said} for role, said in chat]}
    assert answers._answer(row) == ("s\nq\n?", "a")
    assert answers._answer({"text": "once upon"}) == ("", "once upon")
    found = {"other": [("q", "1")], "cut": [("q", "2")], "teacher": [("q", "3")]}
    assert answers.answers_of(found, ["teacher", "cut"]) == [
        ["prompt", "teacher", "cut", "other"], ["q", "3", "2", "1"],
    ]  # fmt: skip
    assert answers.answers_of({}, ["teacher"]) == []


def test_the_pages_need_nothing_from_elsewhere(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) == 6
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    linked = re.findall(r"\]\((.*?)\)", (finished / "report.md").read_text())
    assert len(linked) == 6
    for name in linked:
        ElementTree.parse(finished / name)


def test_a_run_of_plain_text_without_speeds_is_reported(tmp_path: Path, finished: Path) -> None:
    record = json.loads((finished / "evaluate.json").read_text())
    for model in (record["teacher"], *record["models"]):
        for key in ("exact_match", "flips", "samples", "correct"):
            model.pop(key, None)
    write_json(tmp_path / "evaluate.json", record)
    Mask("parent", 7, (0, 1, 2), "Random").save(tmp_path / "search/mask.json")
    report.main(["--run", str(tmp_path)])
    rows = report.table_of(json.loads((tmp_path / "report.json").read_text()))
    labels = {row[0] for row in rows}
    assert "held-out KL, nats" in labels
    assert not {"exact match", "decode, tokens/s", "items lost / gained"} & labels


def test_what_was_generated_is_shown_as_text_not_as_markup(tmp_path: Path, finished: Path) -> None:
    tmp_path /= "a run"
    record = json.loads((finished / "evaluate.json").read_text())
    record["teacher"]["samples"][0] = "<script>alert(1)</script> `x`"
    write_json(tmp_path / "evaluate.json", record)
    Mask("parent", 7, (0, 1, 2), "Random").save(tmp_path / "search/mask.json")
    report.main(["--run", str(tmp_path)])
    assert "<script>" not in (tmp_path / "report.html").read_text() + (tmp_path / "report.md").read_text()
    command = json.loads((tmp_path / "report.json").read_text())["command"]
    assert shlex.split(command)[3:] == ["report", "--run", str(tmp_path)]


def test_missing_and_broken_pieces_are_named(tmp_path: Path, finished: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluate --teacher DIR .* --out '.*/a run/evaluate\.json'$"):
        report.main(["--run", str(tmp_path / "a run")])
    write_json(tmp_path / "evaluate.json", json.loads((finished / "evaluate.json").read_text()))
    with pytest.raises(ConfigError, match=r"mask\.json"):
        report.main(["--run", str(tmp_path)])
    Mask("parent", 7, (0, 1, 2), "Random").save(tmp_path / "search/mask.json")
    (tmp_path / "benchmark.json").write_text("{")
    with pytest.raises(ConfigError, match=r"benchmark\.json"):
        report.main(["--run", str(tmp_path)])
    assert not list(tmp_path.glob("report.*")), "nothing half-written"


def test_equal_figures_are_equal_files() -> None:
    first, second = (figures.svg(figures.layer_strip(9, [2, 5])) for _ in range(2))
    assert first == second != figures.svg(figures.layer_strip(9, [2, 6]))


def test_constant_and_single_point_courses_can_be_drawn() -> None:
    for course in ([(1, 0.5)], [(1, 0.0), (2, 0.0)]):
        figures.svg(figures.courses(course, []))


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (960, "960"), (12_345, "12.3 k"), (4.56e6, "4.56 M"), (1.2e9, "1.2 B")]
)
def test_token_counts_are_short(count: float, text: str) -> None:
    assert figures.tokens_text(count) == text
