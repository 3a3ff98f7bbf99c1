"""The arena: plans expand exactly, finished work is kept, intervals, verdicts and tables are true."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.arena.defaults import defaults
from scripts.arena.gather import gather
from scripts.arena.plan import Plan, Run, nested
from scripts.arena.reading import read
from scripts.arena.record import only, record
from scripts.arena.stages import data as write_data
from scripts.arena.stages import mask, named
from scripts.arena.stages import teacher as judge_teacher
from scripts.arena.table import page
from scripts.arena.work import Work
from scripts.lab.jobs import Job, do
from src.errors import ConfigError

SEARCH: dict[str, Any] = {"configs": ["search.yaml"], "set": {"trainer.max_steps": 4}}
PLAN: dict[str, Any] = {
    "name": "tiny",
    "teacher": "teacher",
    "data": {"train": 3, "validation": 2, "test": 4, "seed": 7},
    "cache": {"configs": ["cache.yaml"]},
    "search": SEARCH,
    "recover": {"configs": ["recover.yaml"], "set": {"trainer.max_steps": 2}},
    "ratios": {0.25: [0, 1], 0.5: [0]},
    "groups": {
        "methods": {
            "reference": "ours",
            "search": {"model.init_args.draws": 2},
            "variants": {
                "ours": {"by_ratio": {0.5: {"model.init_args.draws": 8}}},
                "tail": {
                    "title": "last layers", "overlays": ["tail.yaml"], "search_once": True,
                    "search": {"trainer.max_steps": 1}, "ratios": {0.25: [0, 1]},
                },
                "cut": {"recover": False, "ratios": {0.5: [3]}},
                "soft": {"recover": {"trainer.max_steps": 9}, "ratios": {0.5: [3]}},
            },
        }
    },
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files of the plan."""
    monkeypatch.chdir(tmp_path)
    for name in ("search", "recover", "cache", "tail"):
        Path(f"{name}.yaml").write_text(f"# a comment\nmodel: {name}\n")
    Path("teacher").mkdir()
    Path("teacher/config.json").write_text("{}")
    Path("plan.yaml").write_text(yaml.safe_dump(PLAN, sort_keys=False))
    return tmp_path


@pytest.fixture
def plan(folder: Path) -> Plan:
    return read("plan.yaml")


# ---------------------------------------------------------------------- plan


def test_a_plan_expands_to_exactly_its_runs(plan: Plan) -> None:
    listed = [(run.variant, run.ratio, run.seed, run.search_seed) for run in plan.runs]
    assert listed == [
        ("ours", 0.25, 0, 0), ("ours", 0.25, 1, 1), ("ours", 0.5, 0, 0),
        ("tail", 0.25, 0, 0), ("tail", 0.25, 1, 0), ("cut", 0.5, 3, 3), ("soft", 0.5, 3, 3),
    ]  # fmt: skip
    ours, tail, cut, soft = (plan.runs[i] for i in (0, 3, 5, 6))
    assert ours.search.configs == ("search.yaml",)
    assert ours.search.settings == {"trainer.max_steps": 4, "model.init_args.draws": 2}
    assert plan.runs[2].search.settings == {"trainer.max_steps": 4, "model.init_args.draws": 8}
    assert (tail.title, tail.search.configs) == ("last layers", ("search.yaml", "tail.yaml"))
    assert tail.search.settings == {"trainer.max_steps": 1, "model.init_args.draws": 2}
    assert cut.recover is None
    assert ours.recover is not None
    assert soft.recover is not None
    assert ours.recover.settings == {"trainer.max_steps": 2}
    assert soft.recover.settings == {"trainer.max_steps": 9}
    assert plan.references == {"methods": "ours"}


def test_dotted_keys_become_nested_settings() -> None:
    assert nested({"a.b.c": 1, "a.b.d+": [2], "e": 3}) == {"a": {"b": {"c": 1, "d+": [2]}}, "e": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": {"g": {"reference": "our", "variants": {"ours": {}}}}}, "Did you mean 'ours'"),
        ({"groups": {"g": {"reference": "a", "variants": {"a": {"serch": {}}}}}}, "Did you mean 'search'"),
        ({"search": {"configs": ["none.yaml"]}}, "search: there is no none.yaml"),
        ({"ratio": {}}, r"does not know \['ratio'\]"),
    ],
)
def test_faults_of_a_plan_are_named(folder: Path, change: dict[str, Any], message: str) -> None:
    Path("plan.yaml").write_text(yaml.safe_dump({**PLAN, **change}, sort_keys=False))
    with pytest.raises(ConfigError, match=message):
        read("plan.yaml")


@pytest.mark.parametrize("path", sorted(Path("configs/arena").glob("*.yaml")), ids=str)
def test_shipped_plans_compare_within_a_group_and_ratio(path: Path) -> None:
    runs = read(path).runs
    references = read(path).references
    for run in runs:
        here = {(other.variant, other.ratio) for other in runs if other.group == run.group}
        assert (references[run.group], run.ratio) in here, f"{run} has nothing to be compared with"


# ---------------------------------------------------------------------- what is done again


def test_only_what_depends_on_a_change_is_done_anew(plan: Plan) -> None:
    def addresses(plan: Plan, index: int = 0) -> list[Path]:
        work, run = Work(plan, Path("work")), plan.runs[index]
        jobs = [work.data, work.cache, work.search(run), work.cut(run, [1]), work.recover(run, [1])]
        return [job.at for job in jobs]

    def changed(after: list[Path]) -> list[str]:
        return [new.parts[1] for old, new in zip(before, after, strict=True) if old != new]

    before = addresses(plan)
    Path("search.yaml").write_text("model: search\n")  # the comment is gone, the content is the same
    assert changed(addresses(plan)) == []
    Path("search.yaml").write_text("model: other\n")
    assert changed(addresses(plan)) == ["search"]
    Path("search.yaml").write_text("model: search\n")
    Path("recover.yaml").write_text("model: other\n")
    assert changed(addresses(plan)) == ["recover"]
    Path("recover.yaml").write_text("model: recover\n")
    Path("cache.yaml").write_text("model: other\n")
    assert changed(addresses(plan)) == ["cache", "recover"]
    Path("cache.yaml").write_text("model: cache\n")
    assert changed(addresses(plan, 1)) == ["search", "recover"]  # another seed
    assert changed(addresses(replace(plan, data={**plan.data, "test": 5}))) == [
        "data", "cache", "search", "cut", "recover",
    ]  # fmt: skip


def test_what_runs_share_is_one_job(plan: Plan) -> None:
    work = Work(plan, Path("work"))
    tail = [run for run in plan.runs if run.variant == "tail"]
    assert len({work.search(run) for run in tail}) == 1
    assert len({work.recover(run, [1, 2]) for run in tail}) == 2  # seeds differ in the order of recovery
    ours = plan.runs[0]
    assert work.recover(ours, [1, 2]) == work.recover(tail[0], [1, 2])  # the same mask, the same recovery
    assert work.recover(ours, [1, 2]) != work.recover(ours, [1, 3])
    assert work.cut(ours, [1, 2]) == work.cut(tail[1], [1, 2])


def test_finished_jobs_are_skipped_and_a_failure_stops_no_other(tmp_path: Path) -> None:
    def data(name: str, train: int) -> Job:
        sizes = {"train": train, "validation": 2, "test": 2}
        return Job(name, write_data, tmp_path / name, {"sizes": sizes, "seed": 0})

    bad = Job("bad", judge_teacher, tmp_path / "bad", {"model": "/nowhere", "rows": "none"})
    failed = do([bad, data("a", 3), data("b", 4), data("a", 3)], 2, "test")
    assert list(failed) == [bad]
    assert "cannot read a config from '/nowhere'" in failed[bad]
    assert "Traceback" in (tmp_path / "bad" / "log").read_text()
    assert len((tmp_path / "b" / "train.jsonl").read_text().splitlines()) == 4
    result = data("a", 3).read()
    assert (result["label"], result["sizes"]["train"]) == ("a", 3)
    assert result["peak_mib"] > 1

    (tmp_path / "a" / "train.jsonl").unlink()
    (tmp_path / "b" / "result.json").unlink()
    (tmp_path / "b" / "train.jsonl").unlink()
    assert do([data("a", 3), data("b", 4)], 1, "test") == {}
    assert not (tmp_path / "a" / "train.jsonl").exists(), "finished, so not touched"
    assert (tmp_path / "b" / "train.jsonl").exists(), "not finished, so done again"


# ---------------------------------------------------------------------- results


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
    assert "### methods: 2 of 8 layers removed" in text
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


@pytest.mark.parametrize("removed", [[1, 4], ["2f", "3a", "5a", "5f"]])
def test_removed_layers_and_halves_make_the_mask_that_names_them(
    removed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scripts.arena.stages.load_config", lambda _: None)
    monkeypatch.setattr("scripts.arena.stages.num_layers", lambda _: 6)
    made = mask("teacher", removed)
    assert made.depth == 4
    assert sorted(named(made, made.removed), key=str) == sorted(removed, key=str)
