"""Markdown tables from a results file; nothing is typed by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from scripts.arena import cells
from scripts.arena.cells import JSON, Cell
from scripts.arena.defaults import defaults, rank
from scripts.lab.pages import fill
from scripts.lab.pages import table as markdown
from src.report.figures import tokens_text

Columns = Mapping[str, Cell]

SEEDS: dict[str, Cell] = {"seeds": lambda row: str(len(row["runs"]))}
AGAINST: dict[str, Cell] = {
    "exact match - reference, points": cells.difference("exact_match", 100, 1),
    "KL - reference": cells.difference("kl", 1, 4),
}
MASKS: dict[str, Cell] = {
    "removed": cells.removed,
    "cut: exact match": cells.percent("cut"),
    "lost / gained": cells.lost_gained("cut"),
    "KL": cells.nats("cut"),
    "agreement": cells.mean("cut", lambda judged: 100 * judged["agreement"], "{:.1f} %"),
    "plain KL": cells.nats("learned"),
}
ACTIVE = "active entries of feed-forwards"
MATCHED = ("exact match", "cut: exact match", "of teacher", "lost / gained", next(iter(AGAINST)))
"""Columns of problems; texts have no answers."""
FORWARD: dict[str, Cell] = {
    "search, forward tokens": cells.cost("search", lambda s: s["metrics"].get("forward_tokens"), tokens_text)
}
PLAIN: dict[str, Cell] = {"plain KL - reference": cells.difference("learned", 1, 4)}
CUT: Sequence[Columns] = ({"variant": cells.method} | SEEDS | MASKS | PLAIN | AGAINST | FORWARD,)
RECOVERED: Sequence[Columns] = (
    {"recovered": cells.method} | SEEDS | {
        "exact match": cells.percent("recovered"),
        "of teacher": cells.mean("recovered", lambda judged: 100 * (judged["ratio"] or 0), "{:.1f} %"),
        "lost / gained": cells.lost_gained("recovered"),
        "KL": cells.nats("recovered"),
        "KL before": cells.nats("cut"),
        "agreement": cells.mean("recovered", lambda judged: 100 * judged["agreement"], "{:.1f} %"),
        ACTIVE: cells.cost("recovery", lambda s: s.get("measured", {}).get("val/active"), "{:.1%}".format),
    } | AGAINST,
    {"not recovered": cells.method} | MASKS,
    {"cost": cells.method} | FORWARD | {
        "search, corpus tokens": cells.cost("search", lambda s: s["tokens"], tokens_text),
        "search, CPU s": cells.cost("search", lambda s: s["cpu_seconds"], "{:.0f}".format),
        "search, peak MiB": cells.cost("search", lambda s: s["peak_mib"], "{:.0f}".format),
        "recovery, tokens": cells.cost("recovery", lambda s: s["tokens"], tokens_text),
        "recovery and judging, CPU s": cells.cost("recovery", lambda s: s["cpu_seconds"], "{:.0f}".format),
        "peak MiB": cells.cost("recovery", lambda s: s["peak_mib"], "{:.0f}".format),
    },
)  # fmt: skip


def page(path: Path, results: JSON, figures: Sequence[Path], part: str = "results") -> None:
    """Put the tables and figures into a part of a page; a page that is not there is begun."""
    shown = [f"![{figure.stem}]({figure.relative_to(path.parent)})\n" for figure in figures]
    fill(path, [*shown, *lines(results)], part)


def lines(results: JSON) -> list[str]:
    """Every group and ratio as a section: a contest best first, several groups in the order of the plan."""
    teacher = results["teacher"]
    judged = f"{teacher['problems']} texts"
    if "exact_match" in teacher:
        judged = f"exact match {100 * teacher['exact_match']:.1f} % on {teacher['problems']} problems"
    out = [
        f"Teacher: {judged}, perplexity {teacher['perplexity']:.3f}, {teacher['layers']} layers.", "",
        *origins(results["rows"]), "",
    ]  # fmt: skip
    for failure in results["failed"]:
        out += [f"Not done: {failure}.", ""]
    sections = dict.fromkeys((row["group"], row["ratio"]) for row in results["rows"])
    groups = {group for group, _ in sections}
    if len(groups) > 1:
        out += ["### In short", "", *defaults(results["rows"]), ""]
    for group, ratio in sections:
        rows = [row for row in results["rows"] if (row["group"], row["ratio"]) == (group, ratio)]
        out += [f"### {group}: {100 * ratio:g} % removed", ""]
        if len(groups) == 1:
            rows.sort(key=rank)
        shown = RECOVERED if any("recovered" in row for row in rows) else CUT
        for columns in shown if len(groups) == 1 else shown[:1]:
            out += [*table(rows, columns), ""]
    return out


def origins(rows: Sequence[JSON]) -> list[str]:
    """Which command at which commit measured how many rows."""
    counts = Counter((row["command"], row["commit"]) for row in rows)
    return [f"`{command}`, commit {commit}: {count} rows." for (command, commit), count in counts.items()]


def table(rows: Sequence[JSON], columns: Columns) -> list[str]:
    """A Markdown table; the first column is words, the others are figures."""
    left = [] if "exact_match" in rows[0]["cut"] else [*MATCHED]
    left += [] if any(map(columns.get(ACTIVE, bool), rows)) else [ACTIVE]
    shown = {name: cell for name, cell in columns.items() if name not in left}
    return markdown(" | ".join(shown), ([cell(row) for cell in shown.values()] for row in rows), True)
