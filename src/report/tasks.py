"""Show what models score at public tasks: cells of a report's table, and its figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from src.evaluate.flips import CHANGE, difference
from src.report.figures import INK, colours, styled

Record = dict[str, Any]


def cell(record: Record | None) -> str:
    """Return the score of one metric as text, with all that is known of how it compares with the teacher's.

    That is its ratio; and, of answers that are right or wrong, the difference with its 95 % interval, the
    items lost and gained, and the p-value of :func:`src.evaluate.flips.flips`.

    Args:
        record: of :data:`src.evaluate.tasks.Scores`; None if the model was not judged by the metric.
    """
    if record is None:
        return "-"
    beside = [f"{record['ratio']:.3g}x"] if "ratio" in record else []
    if "flips" in record:
        beside += [CHANGE.format(**difference(record["flips"], len(record["correct"])))]
        beside += ["{lost} / {gained}".format(**record["flips"]), f"p = {record['flips']['p']:.2g}"]
    return f"{record['score']:.4g}" + (f"  ({', '.join(beside)})" if beside else "")


def judged(models: Sequence[Record]) -> list[tuple[str, str]]:
    """Return the tasks that all models have, each with its first metric of right and wrong answers."""
    first, found = models[0].get("tasks", {}), dict[str, str]()
    for task, metrics in first.items():
        for metric in metrics:
            each = (model.get("tasks", {}).get(task, {}).get(metric, {}) for model in models)
            if all("correct" in record for record in each):
                found.setdefault(task, metric)
    return list(found.items())


MOST = 8
"""Tasks that one picture has room for."""


@styled
def bars(models: Sequence[Record]) -> Figure:
    """Draw the scores of all models at the tasks of :func:`judged`, a group of bars each, the teacher first.

    A student's line is the paired 95 % interval of its difference from the teacher, about its own score. Of
    many tasks the first :data:`MOST` are drawn.
    """
    every, names = judged(models), [model["name"] for model in models]
    figure = Figure(figsize=(8.6, 3.0), layout="constrained")
    axis, width, tasks = figure.subplots(), 0.8 / len(models), every[:MOST]
    for place, (model, name, colour) in enumerate(zip(models, names, colours(names), strict=True)):
        records = [model["tasks"][task][metric] for task, metric in tasks]
        at = [group + (place - (len(models) - 1) / 2) * width for group in range(len(tasks))]
        axis.bar(at, [r["score"] for r in records], 0.9 * width, color=colour, label=name)
        for x, record in zip(at, records, strict=True):
            score = top = record["score"]
            if "flips" in record:
                change = difference(record["flips"], len(record["correct"]))
                low, top = (max(0.0, score + change[end] - change["value"]) for end in ("low", "high"))
                axis.plot([x, x], [low, top], color=INK, linewidth=1.2)
            axis.annotate(f"{score:.2f}", (x, top), (0, 3), textcoords="offset points", ha="center")
    axis.set_xticks(range(len(tasks)), [f"{task}, {metric}" for task, metric in tasks])
    left = f"; the first {len(tasks)} of {len(every)}" if every[MOST:] else ""
    axis.set(yticks=[], title=f"Public tasks{left}; lines: 95 % intervals of the difference from the teacher")
    axis.margins(y=0.12)
    axis.spines["left"].set_visible(False)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=len(models))
    return figure
