"""Report on a run: a table, JSON, Markdown and a self-contained HTML page (``python -m src.cli report``).

A run is a directory that the stages have written into; :mod:`src.report.run` lists the files.

Beside ``record.json`` lie hashes of the rows that the stage has read, so that a row that both stages read
counts once. A model is named by the last part of its directory's path, or by as many as make the name unique.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from os.path import abspath
from pathlib import Path
from typing import Any

from src.benchmark import PHASES
from src.command import Parser, rich_table, show
from src.data.distinct import Distinct
from src.errors import ConfigError
from src.files import write_json, write_text
from src.mask import git_sha
from src.report import figures, tasks
from src.report.answers import answers_of
from src.report.pages import (
    Page,
    Picture,
    budgets_of,
    headline,
    html,
    markdown,
    notes,
    printable,
    table_of,
)
from src.report.run import Record, Run, as_written

_JUDGED = (
    *("path", "layers", "parameters", "exact_match", "exact_match_interval", "retention", "flips"),
    *("kl", "kl_interval", "agreement", "loss", "perplexity", "tasks"),
)


def gather(run: Run) -> Record:
    """Return the report as plain values.

    They are the figures of all ``models`` (the teacher first), tokens and seconds by stage, and what was
    removed.
    """
    models = models_of(run.evaluate, run.tasks, run.benchmark)
    names = [model["name"] for model in models]
    stages = ("search", "recover", "evaluate", "benchmark")
    recovered = next((name for name in reversed(names) if name not in ("teacher", "cut")), "recovered")
    seconds = {name: vars(run)[name]["seconds"] for name in stages if "seconds" in vars(run)[name]}
    tokens = {name: vars(run)[name]["tokens"] for name in stages if "tokens" in vars(run)[name]}
    for key, spent in (("tokens", tokens), ("seconds", seconds)):
        costs = {"teacher": run.training.get(key), "cut": spent.get("search")}
        if "search" in spent and "recover" in spent:
            costs[recovered] = spent["search"] + spent["recover"]
        _add(models, key, costs)
    stages_of = {"cut": ["search"], recovered: ["search", "recover"]}
    text = {
        name: Distinct().unite(run.rows[stage] for stage in needed).tokens
        for name, needed in stages_of.items()
        if all(stage in run.rows for stage in needed)
    }
    _add(models, "distinct_tokens", text)
    last = models[-1]
    return {
        "models": models,
        "tokens": tokens,
        "seconds": seconds,
        "teacher_training_tokens": run.training.get("tokens"),
        "depth": run.mask.depth,
        "removed_layers": list(run.mask.removed) if run.mask.unit == "layer" else run.mask.missing,
        "num_layers": run.mask.num_layers,
        "unit": run.mask.unit,
        "search_kl": run.mask.metrics.get("kl"),
        "budgets": run.search.get("budgets", []),
        "decode_speedup": last["decode"]["speedup"] if "decode" in last else None,
        "ideal_speedup": last["decode"]["ideal"] if "decode" in last else None,
        "commands": {s: vars(run)[s]["command"] for s in stages if "command" in vars(run)[s]},
    }


def models_of(evaluate: Record, tasks: Record, benchmark: Record) -> list[Record]:
    """Return the figures of all models that were judged, the teacher first.

    Args:
        evaluate: content of ``evaluate.json``.
        tasks: content of ``tasks.json``, or nothing.
        benchmark: content of ``benchmark.json``, or nothing.

    Raises:
        ConfigError: the speeds are compared with another model than the teacher.
    """
    listed = judged(evaluate)
    own = [m["path"] for m in evaluate["models"]]
    names = ["teacher"] * (len(listed) - len(own)) + distinct(own)
    models = [
        {"name": name} | {key: m[key] for key in _JUDGED if key in m}
        for name, m in zip(names, listed, strict=True)
    ]
    _add_speeds(models, benchmark)
    scores = {abspath(m["path"]): m["tasks"] for m in judged(tasks)}
    _add(models, "tasks", {m["name"]: scores.get(abspath(m["path"])) for m in models})
    return models


def judged(evaluate: Record) -> list[Record]:
    """Return the models that an evaluation has judged, the teacher first."""
    return [model for model in (evaluate.get("teacher"), *evaluate.get("models", [])) if model]


def _add(models: list[Record], key: str, values: Mapping[str, Any]) -> None:
    """Add a figure, given by the model's name, to each model that has one."""
    for model in models:
        if (value := values.get(model["name"])) is not None:
            model[key] = value


def distinct(paths: Sequence[str]) -> list[str]:
    """Return a name for each model: the last parts of its path, as few as make the name unique."""
    parts = [Path(printable(path, "")).parts or ("model",) for path in paths]

    def name(at: int) -> str:
        others = [("teacher",), *parts[:at], *parts[at + 1 :]]
        for count in range(1, len(parts[at]) + 1):
            if all(parts[at][-count:] != other[-count:] for other in others):
                return str(Path(*parts[at][-count:]))
        return f"{Path(*parts[at])} ({at + 1})"  # one path, judged twice

    return [name(at) for at in range(len(paths))]


def _add_speeds(models: list[Record], benchmark: Record) -> None:
    """Add to each model the speeds that were measured, at the first of several batch sizes.

    Raises:
        ConfigError: the speeds are compared with another model than the teacher.
    """
    if not benchmark:
        return
    beside, teacher = benchmark["baseline"]["path"], models[0]["path"]
    if abspath(beside) != abspath(teacher):
        raise ConfigError(
            f"run: benchmark.json compares with '{beside}', evaluate.json with '{teacher}'. Measure again "
            f"with: python -m src.cli benchmark --baseline {shlex.quote(teacher)}"
        )
    for measured in benchmark["measured"]:
        for model in models:
            same = abspath(measured["path"]) == abspath(model["path"])
            if same and "batch_size" not in model:
                model |= {key: measured[key] for key in ("batch_size", *PHASES)}
                model |= {f"{phase}_tokens_per_s": measured[phase]["tokens_per_s"] for phase in PHASES}


def draw(run: Run, report: Record) -> list[Picture]:
    """Draw all figures for which there are data, in the run or in its report by :func:`gather`."""
    models = report["models"]
    names = [model["name"] for model in models]
    drawn = [("layers", f"What the search removed: {run.mask.missing}.", figures.mask_strip(run.mask))]
    if curve := report["budgets"]:
        what = "What each budget of the search costs, on its calibration rows."
        drawn.append(("budgets", what, figures.budgets(curve, report["num_layers"])))
    if keys := [key for key in figures.QUALITIES if all(key in model for model in models)]:
        what = "What is kept, on the same held-out rows."
        drawn.append(("quality", what, figures.quality(names, models, keys)))
    if fast := [model for model in models[1:] if "decode" in model]:
        what = "Measured speed-up with its quartiles; the upright line is the ideal."
        drawn.append(("speed", what, figures.speed([model["name"] for model in fast], fast)))
    if tasks.judged(models):
        drawn.append(
            ("tasks", "What is right of each public task, on the same documents.", tasks.bars(models))
        )
    training = report["teacher_training_tokens"]
    tokens = {"teacher's training": training} | report["tokens"] if training else report["tokens"]
    if tokens or report["seconds"]:
        drawn.append(("cost", "What each stage cost.", figures.cost(tokens, report["seconds"])))
    search, recover = run.search.get("history", []), run.recover.get("history", [])
    if search or recover:
        what = "While learning: the KL of drawn masks from the teacher, then the loss of the student."
        drawn.append(("courses", what, figures.courses(search, recover)))
    if keep_SL := run.gates.get("keep_probability"):
        of = "of the units that a layer keeps, mean" if run.mask.wide else "that a layer is kept"
        drawn.append(("gates", "How the search made up its mind.", figures.gate_map(keep_SL, of)))
    return [Picture(name, caption, figures.svg(figure)) for name, caption, figure in drawn]


def assemble(run: Run, origin: Record) -> tuple[Record, Page]:
    """Return the report as plain values, and the page that Markdown and HTML show.

    ``origin`` names the commit and the command; both results state it.

    Raises:
        ConfigError: ``benchmark.json`` and ``evaluate.json`` compare with different teachers.
    """
    report = gather(run) | origin
    names = [model["name"] for model in report["models"]]
    said = {n: m["samples"] for n, m in zip(names, judged(run.evaluate), strict=True) if m.get("samples")}
    first = {n: [(asked, own[0]) for asked in run.evaluate.get("prompts", [])[:1]] for n, own in said.items()}
    facts = {key: run.evaluate[key] for key in ("device", "dtype", "threads", "torch")}
    page = Page(
        title=headline(report),
        tables=[table_of(report), *([budgets_of(report)] if report["budgets"] else [])],
        notes=notes(report),
        pictures=draw(run, report),
        answers=answers_of(run.answers or first, names),
        origin=facts | origin,
    )
    return report, page


def main(argv: list[str]) -> None:
    """Report on a run: print the table, write ``report.json``, ``report.md``, ``report.html`` and figures.

    Raises:
        ConfigError: a file of the run is missing, or is not as the stages write it.
    """
    parser = Parser("report", "Gather a run's figures into a table, JSON, Markdown and HTML.")
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="directory of the run")
    directory: Path = parser.parse_args(argv).run
    origin = {
        "commit": git_sha(),
        "command": printable(shlex.join(["python", "-m", "src.cli", "report", "--run", str(directory)])),
    }
    with as_written(directory):
        report, page = assemble(Run.read(directory), origin)
    for picture in page.pictures:
        write_text(directory / "figures" / f"{picture.name}.svg", picture.svg)
    write_text(directory / "report.md", markdown(page))
    write_text(directory / "report.html", html(page))
    write_json(directory / "report.json", report)
    for table in page.tables:
        show(rich_table(table))
    print(f"{page.title}.")
    for note in page.notes:
        print(f"note: {note}")
    print(f"report: {directory}/report.html, report.md and report.json")
