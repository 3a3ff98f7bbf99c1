"""Figures of methods that compete: what they keep, what recovery makes of them, which layers they remove."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from scripts.arena.cells import JSON
from src.report.figures import AMBER, PALE, SLATE, TEAL, styled

MARKS = "osD^vP*Xh<>pd8H"


def look(rows: Sequence[JSON]) -> dict[str, dict[str, Any]]:
    """Colour and marker of every method: the reference stands out, the others share cooler colours."""
    names = list(dict.fromkeys(row["variant"] for row in rows))
    shades = ("#7c3aed", "#be123c", "#0369a1", "#4d7c0f", SLATE, AMBER)
    out = {n: {"color": shades[i % 6], "marker": MARKS[i % len(MARKS)]} for i, n in enumerate(names)}
    ours = {rows[0]["reference"]: {"color": TEAL, "marker": "o", "zorder": 5, "linewidth": 2.5}}
    return out | {name: style for name, style in ours.items() if name in out}


def value(row: JSON, stage: str, metric: str) -> float:
    """A figure of a row; exact match in percent."""
    found: float = row[stage][metric]["value"]
    return 100 * found if metric == "exact_match" else found


@styled
def retention(results: JSON) -> Figure:
    """Exact match kept, of the teacher's, against layers removed, before and after recovery."""
    rows, teacher = results["rows"], results["teacher"]["exact_match"]
    figure = Figure(figsize=(9.2, 4.6), layout="constrained")
    styles = look(rows)
    for axis, stage, title in zip(
        figure.subplots(1, 2, sharey=True), ("cut", "recovered"), ("Cut", "Cut and recovered"), strict=True
    ):
        for name, style in styles.items():
            own = [row for row in rows if row["variant"] == name]
            points = sorted(
                (len(r["runs"][0]["removed"]), value(r, stage, "exact_match") / teacher) for r in own
            )
            axis.plot(*zip(*points, strict=True), label=own[0]["title"], alpha=0.85, markersize=5, **style)
        axis.set_title(f"{title}: % of the teacher's exact match")
        axis.set_xlabel(f"layers removed, of {results['teacher']['layers']}")
        axis.set_xticks(sorted({len(row["runs"][0]["removed"]) for row in rows}))
        axis.grid(visible=True, axis="y")
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    return figure


@styled
def before_and_after(rows: Sequence[JSON]) -> Figure:
    """Does the mask's own divergence tell what recovery makes of it? One panel a ratio, one mark a run."""
    ratios, styles = sorted({row["ratio"] for row in rows}), look(rows)
    figure = Figure(figsize=(9.2, 4.2), layout="constrained")
    for axis, ratio in zip(figure.subplots(1, len(ratios), squeeze=False)[0], ratios, strict=True):
        for row in (row for row in rows if row["ratio"] == ratio):
            style = {**styles[row["variant"]], "linestyle": ""}
            points = [(run["cut"]["kl"], 100 * run["recovered"]["exact_match"]) for run in row["runs"]]
            axis.plot(*zip(*points, strict=True), label=row["title"], alpha=0.85, markersize=6, **style)
        log_nats(axis)
        axis.set_title(f"{len(row['runs'][0]['removed'])} layers removed")
        axis.set(xlabel="KL of the cut, nats", ylabel="exact match after recovery, %")
        axis.grid(visible=True, axis="both")
    handles = {n: h for a in figure.axes for h, n in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside right upper", fontsize=8)
    return figure


@styled
def layers(rows: Sequence[JSON], depth: int) -> Figure:
    """Which layers each method removes; the share of its searches that remove a layer is its shade."""
    ratios, names = sorted({row["ratio"] for row in rows}), list(look(rows))
    figure = Figure(figsize=(3.2 * len(ratios) + 1.6, 0.27 * len(names) + 1), layout="constrained")
    for axis, ratio in zip(figure.subplots(1, len(ratios), squeeze=False)[0], ratios, strict=True):
        found = {row["variant"]: row for row in rows if row["ratio"] == ratio}
        for line, name in enumerate(names):
            masks = (
                {run["search_seed"]: run["removed"] for run in found[name]["runs"]} if name in found else {}
            )
            for layer in range(depth):
                share = sum(layer in gone for gone in masks.values()) / max(1, len(masks))
                box = Rectangle((layer - 0.45, line - 0.42), 0.9, 0.84, facecolor=PALE if masks else "white")
                axis.add_patch(box)
                axis.add_patch(Rectangle(box.get_xy(), 0.9, 0.84, facecolor=AMBER, alpha=share))
        titles = {row["variant"]: row["title"] for row in rows}
        axis.set_yticks(
            range(len(names)), [titles[n] for n in names] if axis is figure.axes[0] else [""] * len(names)
        )
        axis.set(
            xlim=(-0.6, depth - 0.4), ylim=(len(names) - 0.4, -0.6), xticks=range(0, depth, 3), xlabel="layer"
        )
        axis.set_title(f"{100 * ratio:g} % removed")
        for side in axis.spines.values():
            side.set_visible(False)
    return figure


def log_nats(axis: Axes) -> None:
    """A logarithmic axis of divergences with plain labels."""
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
