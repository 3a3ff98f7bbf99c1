"""Run a plan, and write its results file, page and figures: ``make fair-fight``, ``make ablations``.

The same command again goes on where it was stopped, and does nothing where everything is done.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from scripts.arena.figures import draw
from scripts.arena.plan import Plan
from scripts.arena.reading import read
from scripts.arena.record import only, record
from scripts.arena.table import page
from scripts.arena.work import Work
from scripts.lab.jobs import Job, do
from scripts.lab.results import read as published
from src.errors import ConfigError
from src.files import write_json


def work_through(work: Work, workers: int) -> dict[Job, str]:
    """Everything the plan asks for, in three waves; what depends on a failure is left out."""
    failed: dict[Job, str] = {}
    runs = work.plan.runs
    cache = work.cache if any(run.recover for run in runs) else None
    for job in filter(None, (work.data, work.teacher, cache)):
        failed |= do([job], 1, job.label)
    if failed:
        return failed
    failed |= do([work.search(run) for run in runs], workers, "searches")
    found = [(run, job.read()) for run in runs if (job := work.search(run)).result.exists()]
    judged = [work.cut(run, search[key]) for run, search in found for key in ("learned", "removed")]
    recovered = [work.recover(run, search["removed"]) for run, search in found if run.recover is not None]
    return failed | do([*judged, *recovered], workers, "judgements and recoveries")


def renamed(plan: Plan, teacher: str | None, name: str | None) -> Plan:
    """The plan for another teacher, whose results must not be taken for the plan's own.

    Raises:
        ConfigError: they would be; or the teacher, or a file of the plan, is not there.
    """
    if teacher and not name:
        raise ConfigError("--teacher: another teacher needs a --name for its results.")
    needed = [teacher or plan.teacher, *(told["path"] for told in plan.data.get("files", {}).values())]
    if missing := [path for path in dict.fromkeys(needed) if not Path(path).exists()]:
        where = "E3_SHARED names the folder of what is no part of this repository."
        raise ConfigError(f"{plan.name}: there is no {', '.join(missing)}. {where}")
    return replace(plan, teacher=teacher or plan.teacher, name=name or plan.name)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.arena", description=__doc__)
    parser.add_argument("plan", help="such as configs/arena/fair_fight.yaml")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one CPU thread each")
    told = "work on these variants or groups, and what they are compared with; published rows stay"
    parser.add_argument("--only", nargs="+", metavar="NAME", help=told)
    parser.add_argument("--teacher", help="another model of the demo's task than the plan's; needs --name")
    parser.add_argument("--name", help="of the results file, page and figures, instead of the plan's")
    parser.add_argument("--work", type=Path, default=Path("logs/arena"), help="where runs are kept")
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    args = parser.parse_args(argv)
    try:
        plan = renamed(read(args.plan), args.teacher, args.name)
        part, asked = only(plan, args.only or list(plan.references))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    work, out = Work(part, args.work / plan.name), args.results / f"{plan.name}.json"
    failed = [f"{job.label}: {why}" for job, why in work_through(work, args.jobs).items()]
    if work.teacher.result.exists():
        results = record(work, plan, asked, failed, published(out))
        write_json(out, results)
        figures = draw(results, args.docs / "figures")
        into, _, place = plan.name.partition(".")
        page(args.docs / f"{into}.md", results, figures, place or "results")
    for told in failed:
        print(told, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
