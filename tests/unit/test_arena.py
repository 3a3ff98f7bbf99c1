"""The arena: plans expand exactly, finished work is kept, intervals, verdicts and tables are true."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.arena.plan import Plan, nested
from scripts.arena.reading import read
from scripts.arena.stages import data as write_data
from scripts.arena.stages import teacher as judge_teacher
from scripts.arena.work import Work
from scripts.lab.jobs import Job, do
from src.errors import ConfigError
from tests.arena import PLAN

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
