"""Rows of results are computed from what runs wrote, and the page from the rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.arena.contest import across
from scripts.arena.defaults import defaults
from scripts.arena.gather import gather
from scripts.arena.plan import Plan, Run
from scripts.arena.record import only, record
from scripts.arena.stages import mask, named
from scripts.arena.table import FORWARD, page
from scripts.arena.work import Work
from scripts.lab.jobs import Job
from src.errors import ConfigError


def written(work: Work, run: Run, removed: list[int], correct: str, kl: float) -> None:
    """What the jobs of a run would have written; the cut model gets nothing right."""
    cost = {"label": "", "seconds": 2.0, "cpu_seconds": 1.0, "peak_mib": 10.0, "commit": "c"}
    tokens = [10, 20, 30, 40]

    def judged(correct: str, kl: float) -> dict[str, Any]:
        sums = {key: [kl * n for n in tokens] for key in ("loss", "teacher_loss", "kl", "agreement")}
        return {"correct": correct, "sums": {**sums, "tokens": tokens}, "parameters": 5}

    def save(job: Job, out: dict[str, Any]) -> None:
        job.at.mkdir(parents=True, exist_ok=True)
        job.result.write_text(json.dumps({**cost, **out}))

    save(work.teacher, judged("1111", 0.0))
    metrics = {"forward_tokens": 1500.0}
    save(
        work.search(run), {"removed": removed, "learned": [0, 1], "tokens": 60, "metrics": metrics}
    )  # fmt: skip
    for gone in (removed, [0, 1]):
        save(work.cut(run, gone), judged("0000", 1.0))
    if run.recover is not None:
        save(
            work.recover(run, removed), {"tokens": 70, "steps": 2, "fit_seconds": 1.0, **judged(correct, kl)}
        )


@pytest.fixture
def rows(plan: Plan) -> dict[tuple[str, float], dict[str, Any]]:
    work = Work(plan, Path("work"))
    for run in plan.runs:
        if run.ratio == 0.25:
            ours = run.variant == "ours"
            # Ours is right on 3 and then 4 of 4 problems; the tail on 1 of 4 with both seeds.
            correct = ("1110", "1111")[run.seed] if ours else "0100"
            written(work, run, [2, 3] if ours else [4, 5], correct, 0.1 if ours else 0.3)
    origin = {"command": "run", "commit": "abc"}
    return {(row["variant"], row["ratio"]): row | origin for row in gather(work)}


def test_rows_hold_the_means_and_the_paired_differences(
    rows: dict[tuple[str, float], dict[str, Any]],
) -> None:
    assert list(rows) == [("ours", 0.25), ("tail", 0.25)]  # the others are not done
    ours, tail = rows.values()
    assert [run["recovered"]["exact_match"] for run in ours["runs"]] == [0.75, 1.0]
    assert ours["recovered"]["exact_match"]["value"] == 0.875
    assert tail["recovered"]["exact_match"]["value"] == 0.25
    assert tail["runs"][1]["recovered"]["flips"] == {"lost": 3, "gained": 0, "p": 0.25}
    assert tail["runs"][0]["recovered"]["ratio"] == 0.25
    assert ours["difference"]["exact_match"] == {"value": 0, "low": 0, "high": 0, "verdict": "tied"}
    assert tail["difference"]["exact_match"]["value"] == 0.25 - 0.875
    assert tail["difference"]["kl"] == pytest.approx(
        {"value": 0.2, "low": 0.2, "high": 0.2, "verdict": "worse"}
    )
    assert tail["difference"]["seeds"] == [0, 1]
    assert tail["cut"]["kl"]["value"] == 1.0
    assert tail["runs"][0]["recovery"]["tokens"] == 70


def test_rows_are_redone_alone_and_the_published_ones_stay(
    rows: dict[tuple[str, float], dict[str, Any]], plan: Plan
) -> None:
    whole, _ = only(plan, ["methods"])
    assert whole == plan
    part, asked = only(plan, ["tail"])
    assert asked == {("methods", "tail")}
    assert {run.variant for run in part.runs} == {"ours", "tail"}, "with what it is compared with"
    with pytest.raises(ConfigError, match="'tial' given"):
        only(plan, ["tial"])
    cut = {**rows["tail", 0.25], "variant": "cut", "ratio": 0.5, "commit": "older", "command": "old"}
    gone = {**cut, "variant": "no longer in the plan"}
    known: dict[str, Any] = {
        "command": "old", "commit": "old", "data": dict(plan.data), "teacher": {"path": "teacher"},
        "rows": [cut, gone, {**rows["tail", 0.25], "commit": "old"}, {**rows["ours", 0.25], "commit": "old"}],
    }  # fmt: skip
    Path("teacher/config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 8}))
    work = Work(plan, Path("work"))
    for run in plan.runs:
        if run.ratio == 0.25:
            written(work, run, [2, 3], "0001", 0.2)
    found = record(work, plan, asked, [], known)["rows"]
    assert [(row["variant"], row["ratio"]) for row in found] == [("ours", 0.25), ("tail", 0.25), ("cut", 0.5)]
    assert found[1]["command"] not in ("run", "old")
    assert found[2]["command"] == "old"
    assert found[0] == {**rows["ours", 0.25], "commit": "old"}, "published, and not asked for"
    assert found[1]["recovered"]["exact_match"]["value"] == 0.25
    elsewhere = {**known, "data": {**plan.data, "seed": 8}}
    assert len(record(work, plan, asked, [], elsewhere)["rows"]) == 2, "of other problems, so dropped"


def test_the_page_is_made_from_the_results(
    rows: dict[tuple[str, float], dict[str, Any]], tmp_path: Path
) -> None:
    teacher = {"exact_match": 1.0, "problems": 4, "layers": 8, "perplexity": 1.5}
    results = {"name": "tiny", "command": "run", "commit": "abc", "teacher": teacher, "failed": ["x: y"]}
    path = tmp_path / "tiny.md"
    path.write_text("Prose.\n<!-- results -->\nold\n<!-- /results -->\nMore prose.\n")
    page(path, {**results, "rows": list(rows.values())}, [tmp_path / "figures" / "tiny_a.svg"])
    text = path.read_text()
    assert text.startswith("Prose.\n<!-- results -->\n![tiny_a](figures/tiny_a.svg)\n")
    assert text.endswith("<!-- /results -->\nMore prose.\n")
    assert "old" not in text
    assert "Not done: x: y." in text
    assert "`run`, commit abc: 2 rows." in text
    assert "### methods: 25 % removed" in text
    lines = text.splitlines()
    best, tail, *_ = (line for line in lines if line.startswith(("| **ours**", "| last layers")))
    assert best.startswith("| **ours** | 2 | 87.5 % [")
    assert best.endswith("|  |  |"), "nothing to compare the reference with"
    assert tail.startswith(
        "| last layers | 2 | 25.0 % [0.0, 75.0] | 25.0 % | 3 / 0 | 0.3000 [0.3000, 0.3000] |"
    )
    assert tail.endswith("| +0.2000 [+0.2000, +0.2000] worse |")
    assert any(line.startswith("| last layers | 1.5 k | 60 | 1 |") for line in lines)
    page(path, {**results, "rows": list(rows.values())}, [tmp_path / "figures" / "tiny_a.svg"])
    assert path.read_text() == text


def test_a_default_stands_beside_the_best_of_the_others(
    rows: dict[tuple[str, float], dict[str, Any]],
) -> None:
    ours, tail = rows.values()
    worst = {**tail, "variant": "worst", "title": "worst", "recovered": {**tail["recovered"]}}
    worst["recovered"]["exact_match"] = {"value": 0.0, "low": 0.0, "high": 0.0}
    head, line, row = defaults([worst, ours, tail])
    assert head.count("|") == line.count("|") == row.count("|")
    assert row.startswith("| methods | ours | 87.5 % [")
    assert "| last layers | 25.0 % [" in row, "the best of the others, not the first"
    assert "| -62.5 [" in row
    assert row.endswith("| +0.2000 [+0.2000, +0.2000] worse |")


def test_a_mask_that_was_given_cost_no_search(rows: dict[tuple[str, float], dict[str, Any]]) -> None:
    row, (cell,) = rows["ours", 0.25], FORWARD.values()
    assert cell(row) == "1.5 k"
    for run in row["runs"]:
        run["search"]["metrics"] = {}
    assert cell(row) == ""


def test_recoveries_of_one_cut_are_drawn_against_what_they_differ_in() -> None:
    def row(cut: float, **recovery: Any) -> dict[str, Any]:
        recovered = {"kl": 0.01, "exact_match": 0.5}
        return {"runs": [{"cut": {"kl": cut}, "recovered": recovered, "recovery": {"steps": 6, **recovery}}]}

    active = {"measured": {"val/active": 0.25}}
    for rows, below, point in (
        ([row(0.1), row(0.2)], "KL of the cut, nats", (0.1, 50.0)),
        ([row(0.1, **active), row(0.1, **active)], "active entries of feed-forwards, %", (25.0, 0.01)),
        ([row(0.1), row(0.1, **active)], "steps of recovery", (6, 0.01)),
    ):
        found, _, show = across(rows)
        assert (found, show(rows[0]["runs"][0])) == (below, point)


@pytest.mark.parametrize("removed", [[1, 4], ["2f", "3a", "5a", "5f"]])
def test_removed_layers_and_halves_make_the_mask_that_names_them(
    removed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scripts.arena.stages.load_config", lambda _: None)
    monkeypatch.setattr("scripts.arena.stages.num_layers", lambda _: 6)
    made = mask("teacher", removed)
    assert made.depth == 4
    assert sorted(named(made, made.removed), key=str) == sorted(removed, key=str)


def test_removed_units_of_width_are_the_bits_of_a_number_for_each_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("scripts.arena.stages.load_config", lambda _: None)
    monkeypatch.setattr("scripts.arena.stages.num_layers", lambda _: 3)
    removed = ["channel:8:81", "channel:8:6", "channel:8:c0"]
    made = mask("teacher", removed)
    assert made.by_layer == [[1, 2, 3, 4, 5, 6], [0, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5]]
    assert named(made, made.removed) == removed
