"""Figures of a results file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from scripts.arena.cells import JSON, at
from scripts.arena.contest import before_and_after, layers, log_nats, retention
from src.files import write_text
from src.report.figures import INK, TEAL, styled, svg


def draw(results: JSON, into: Path) -> list[Path]:
    """Write every figure that the results have something for; their paths."""
    rows = results["rows"]
    made = {}
    if any("recovered" in row for row in rows) and len({row["group"] for row in rows}) == 1:
        made = {"retention": retention(rows), "recovery": before_and_after(rows)}
        if all(row["kind"] for row in rows):  # methods that choose layers or halves have one
            made["layers"] = layers(rows, results["teacher"]["layers"])
    elif rows:
        made = {"divergences": divergences(rows)}
    files = {into / f"{results['name']}_{name}.svg": svg(figure) for name, figure in made.items()}
    for path, text in files.items():
        write_text(path, text)
    return list(files)


@styled
def divergences(rows: Sequence[JSON]) -> Figure:
    """Divergence of each variant with its interval, a panel a group.

    The reference is teal. A hollow mark is the method's plain answer, before candidates and polish.
    """
    groups = list(dict.fromkeys(row["group"] for row in rows))
    sizes = [sum(row["group"] == group for row in rows) for group in groups]
    figure = Figure(figsize=(7.6, 0.26 * sum(sizes) + 0.75 * len(groups)), layout="constrained")
    axes = figure.subplots(len(groups), 1, squeeze=False, height_ratios=[n + 1 for n in sizes])[:, 0]
    for axis, group in zip(axes, groups, strict=True):
        own = [row for row in rows if row["group"] == group]
        for line, row in enumerate(own):
            kl, colour = at(row, "recovered")["kl"], TEAL if row["variant"] == row["reference"] else INK
            axis.plot([kl["low"], kl["high"]], [line, line], color=colour, linewidth=1.6)
            axis.plot(kl["value"], line, "o", color=colour, markersize=5)
            if "recovered" not in row:
                axis.plot(row["learned"]["kl"]["value"], line, "o", color=colour, fillstyle="none")
        log_nats(axis)
        axis.set_yticks(range(len(own)), [row["title"] for row in own])
        axis.set_ylim(len(own) - 0.4, -0.6)
        recovered = "recovered" if any("recovered" in row for row in own) else "not recovered"
        axis.set_title(f"{group.replace('_', ' ')}: KL from the teacher, nats ({recovered})")
        axis.grid(visible=True, axis="x")
    return figure
