"""One run as a table, ``report.json``, Markdown and a self-contained HTML page: ``python -m src.cli report``.

A run is a directory that the stages have written into. What the report reads, and who writes it:

=======================  ===========================================================================
``search/mask.json``     the search, as it ends (needed)
``search/record.json``   its tokens, seconds and course (the callback ``StageRecord``)
``search/gates.json``    its keep probabilities, one row of L numbers a step (``SearchMonitor``)
``recover/record.json``  tokens, seconds and course of the recovery (``StageRecord``)
``evaluate.json``        ``evaluate --teacher T --model RUN/cut RUN/recovered ... --out`` (needed)
``benchmark.json``       ``benchmark --baseline T --model RUN/cut RUN/recovered ... --out``
``training.json``        in the teacher's own directory: tokens and seconds of its training
=======================  ===========================================================================

A model goes by the last part of its directory's name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from src.benchmark import PHASES
from src.command import Parser, show
from src.errors import ConfigError
from src.files import write_json, write_text
from src.mask import Mask, git_sha
from src.report import figures
from src.report.pages import Page, Picture, headline, html, markdown, notes, table_rows

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What the stages left in a run's directory; an absent piece is empty."""

    mask: Mask
    evaluate: Record
    training: Record
    search: Record
    gates: Record
    recover: Record
    benchmark: Record

    @classmethod
    def read(cls, directory: Path) -> Run:
        """Read the pieces.

        Raises:
            ConfigError: a piece that is needed is missing, or one is not JSON.
        """
        evaluate = _read(directory / "evaluate.json")
        if not evaluate.get("teacher"):
            raise ConfigError(
                f"--run: '{directory}' holds no evaluate.json with a teacher. Write it with: python -m "
                f"src.cli evaluate --teacher DIR --model DIR --data FILE --out {directory}/evaluate.json"
            )
        return cls(
            mask=Mask.load(directory / "search" / "mask.json"),
            evaluate=evaluate,
            training=_read(Path(evaluate["teacher"]["path"]) / "training.json"),
            search=_read(directory / "search" / "record.json"),
            gates=_read(directory / "search" / "gates.json"),
            recover=_read(directory / "recover" / "record.json"),
            benchmark=_read(directory / "benchmark.json"),
        )


def _read(path: Path) -> Record:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise ConfigError(f"--run: cannot read '{path}': {e}") from e


_JUDGED = (
    *("layers", "parameters", "exact_match", "retention", "flips"),
    *("kl", "agreement", "loss", "perplexity"),
)


def gather(run: Run) -> Record:
    """The report as data: one record a model, tokens and seconds by stage, and what was removed."""
    judged = {"teacher": run.evaluate["teacher"]}
    judged |= {Path(model["path"]).name: model for model in run.evaluate["models"]}
    models = {name: {key: m[key] for key in _JUDGED if key in m} for name, m in judged.items()}
    for measured in run.benchmark.get("measured", []):
        baseline = measured["path"] == run.benchmark["baseline"]["path"]
        model = models.get("teacher" if baseline else Path(measured["path"]).name)
        if model is not None and "batch_size" not in model:  # the first batch size is the headline's
            model |= {key: measured[key] for key in ("batch_size", *PHASES)}
            model |= {f"{phase}_tokens_per_s": measured[phase]["tokens_per_s"] for phase in PHASES}
    stages = ("search", "recover", "evaluate", "benchmark")
    seconds = {name: vars(run)[name]["seconds"] for name in stages if "seconds" in vars(run)[name]}
    tokens = {name: vars(run)[name]["tokens"] for name in stages if "tokens" in vars(run)[name]}
    for key, spent in (("tokens", tokens), ("seconds", seconds)):
        costs = [("teacher", run.training.get(key)), ("cut", spent.get("search"))]
        if "search" in spent and "recover" in spent:
            costs.append(("recovered", spent["search"] + spent["recover"]))
        for name, cost in costs:
            if name in models and cost is not None:
                models[name][key] = cost
    last = list(models.values())[-1]
    return {
        **models,
        "models": list(models),
        "tokens": tokens,
        "seconds": seconds,
        "teacher_training_tokens": run.training.get("tokens"),
        "removed_layers": list(run.mask.removed),
        "num_layers": run.mask.num_layers,
        "search_kl": run.mask.metrics.get("kl"),
        "decode_speedup": last["decode"]["speedup"] if "decode" in last else None,
        "ideal_speedup": last["decode"]["ideal"] if "decode" in last else None,
        "commands": {s: vars(run)[s]["command"] for s in stages if "command" in vars(run)[s]},
    }


def draw(run: Run, report: Record) -> list[Picture]:
    """All figures for which there are data."""
    names = report["models"]
    models = [report[name] for name in names]
    removed = figures.layer_strip(run.mask.num_layers, run.mask.removed)
    drawn = [
        ("layers", "Which layers the search removed.", removed),
        ("quality", "What is kept, on the same held-out rows.", figures.quality(names, models)),
    ]
    if fast := [name for name in names[1:] if "decode" in report[name]]:
        what = "Measured speed-up with its quartiles; the upright line is the ideal."
        drawn.append(("speed", what, figures.speed(fast, [report[name] for name in fast])))
    training = report["teacher_training_tokens"]
    tokens = {"teacher's training": training} | report["tokens"] if training else report["tokens"]
    if tokens or report["seconds"]:
        drawn.append(("cost", "What each stage cost.", figures.cost(tokens, report["seconds"])))
    search, recover = run.search.get("history", []), run.recover.get("history", [])
    if search or recover:
        what = "Divergence from the teacher while learning; of drawn masks, then of the student."
        drawn.append(("courses", what, figures.courses(search, recover)))
    if keep_SL := run.gates.get("keep_probability"):
        drawn.append(("gates", "How the search made up its mind.", figures.gate_map(keep_SL)))
    return [Picture(name, caption, figures.svg(figure)) for name, caption, figure in drawn]


def main(argv: list[str]) -> None:
    """Gather, print the table, write ``report.json``, ``report.md``, ``report.html`` and the figures."""
    parser = Parser("report", "Gather a run's figures into a table, JSON, Markdown and HTML.")
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="directory of the run")
    directory: Path = parser.parse_args(argv).run
    run = Run.read(directory)
    origin = {"commit": git_sha(), "command": f"python -m src.cli report --run {directory}"}
    report = gather(run) | origin
    models = [run.evaluate["teacher"], *run.evaluate["models"]]
    said = {name: m["samples"][0] for name, m in zip(report["models"], models, strict=True) if "samples" in m}
    page = Page(
        title=headline(report),
        rows=table_rows(report),
        notes=notes(report),
        pictures=draw(run, report),
        example={"prompt": run.evaluate["prompts"][0], **said} if said else {},
        origin={key: run.evaluate[key] for key in ("device", "dtype", "threads", "torch")} | origin,
    )
    for picture in page.pictures:
        write_text(directory / "figures" / f"{picture.name}.svg", picture.svg)
    write_text(directory / "report.md", markdown(page))
    write_text(directory / "report.html", html(page))
    write_json(directory / "report.json", report)
    table = Table(*page.rows[0])
    for column in table.columns[1:]:
        column.justify = "right"
    for row in page.rows[1:]:
        table.add_row(*row)
    show(table)
    print(f"{page.title}.")
    for note in page.notes:
        print(f"note: {note}")
    print(f"report: {directory}/report.html, report.md and report.json")
