"""Figures of methods that compete: what they keep, what recovery makes of them, which layers they remove.

A colour is a kind of method; the reference is teal. The methods stand in the same order everywhere, by kind.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
from matplotlib.transforms import Bbox

from scripts.arena.cells import JSON
from src.report.figures import AMBER, INK, PALE, SLATE, TEAL, styled

Point = tuple[float, float]
KINDS = {"learned": "#7c3aed", "searched": AMBER, "scored": "#0369a1", "fixed": SLATE, "": INK}
"""Colour of each ``kind``: learned by gradients, searched mask by mask, scored layer by layer, fixed."""


def colour(row: JSON) -> str:
    """Colour of a method."""
    return TEAL if row["variant"] == row["reference"] else KINDS[row["kind"]]


def methods(rows: Sequence[JSON]) -> list[JSON]:
    """One row of each method, the reference first, then by kind in the order of the plan."""
    found = {row["variant"]: row for row in rows}
    return sorted(found.values(), key=lambda r: (r["variant"] != r["reference"], [*KINDS].index(r["kind"])))


def panels(rows: Sequence[JSON], height: float, **keys: Any) -> tuple[Figure, list[tuple[Axes, list[JSON]]]]:
    """A figure with a panel for each ratio and a legend of the kinds below; each panel with its rows."""
    ratios = sorted({row["ratio"] for row in rows})
    figure = Figure(figsize=(9.2, height), layout="constrained")
    axes = figure.subplots(1, len(ratios), squeeze=False, **keys)[0]
    shown = {row["kind"]: KINDS[row["kind"]] for row in methods(rows)[1:] if row["kind"]}
    marks = {methods(rows)[0]["title"]: TEAL, **shown}
    handles = [Line2D([], [], color=c, marker="o", linestyle="", label=name) for name, c in marks.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9)
    each = [[row for row in rows if row["ratio"] == ratio] for ratio in ratios]
    for axis, own in zip(axes, each, strict=True):
        axis.set_title(f"{100 * own[0]['ratio']:g} % removed")
    return figure, list(zip(axes, each, strict=True))


def name_lines(axis: Axes, names: Sequence[JSON]) -> None:
    """A line for each method, named in its colour."""
    axis.set_yticks(range(len(names)), [row["title"] for row in names])
    axis.set_ylim(len(names) - 0.4, -0.6)
    for label, row in zip(axis.get_yticklabels(), names, strict=True):
        label.set_color(colour(row))


def placed(rows: Sequence[JSON], names: Sequence[JSON]) -> list[tuple[int, JSON]]:
    """Rows of one ratio, each with the line of its method."""
    order = [row["variant"] for row in names]
    return [(order.index(row["variant"]), row) for row in methods(rows)]


@styled
def retention(rows: Sequence[JSON]) -> Figure:
    """Exact match of every method, cut (hollow) and recovered (filled), each with its interval."""
    names = methods(rows)
    figure, each = panels(rows, 0.26 * len(names) + 1.3, sharey=True)
    for axis, own in each:
        for line, row in placed(own, names):
            shade = colour(row)
            cut, healed = (row[stage]["exact_match"] for stage in ("cut", "recovered"))
            ends = [100 * match["value"] for match in (cut, healed)]
            axis.plot(ends, [line] * 2, color=PALE, linewidth=1.2, zorder=1)
            for match, fill in ((cut, "white"), (healed, shade)):
                axis.plot([100 * match["low"], 100 * match["high"]], [line] * 2, color=shade, linewidth=1.4)
                axis.plot(100 * match["value"], line, "o", color=shade, markerfacecolor=fill, markersize=5.5)
        axis.set(xlim=(-4, 104), xticks=range(0, 101, 25), xlabel="exact match, %")
        axis.grid(visible=True, axis="x")
    name_lines(each[0][0], names)
    figure.suptitle("hollow: cut; filled: recovered; bars: 95 % intervals", fontsize=9, x=0.01, ha="left")
    return figure


def across(rows: Sequence[JSON]) -> tuple[str, str, Callable[[JSON], Point]]:
    """What recoveries are drawn against, and what of them; those of one cut by what they differ in."""
    runs = [run for row in rows for run in row["runs"]]
    if len({run["cut"]["kl"] for run in runs}) > 1:
        both = "KL of the cut, nats", "exact match after recovery, %"
        return *both, lambda run: (run["cut"]["kl"], 100 * run["recovered"]["exact_match"])
    left = "KL after recovery, nats"
    if all("val/active" in run["recovery"].get("measured", {}) for run in runs):
        active = "active entries of feed-forwards, %"
        return active, left, lambda r: (100 * r["recovery"]["measured"]["val/active"], r["recovered"]["kl"])
    return "steps of recovery", left, lambda run: (run["recovery"]["steps"], run["recovered"]["kl"])


@styled
def before_and_after(rows: Sequence[JSON]) -> Figure:
    """Does the mask's own divergence tell what recovery makes of it? Means over the seeds of each method.

    Of one mask it is a curve: points are joined whose titles agree up to a comma.
    """
    figure, each = panels(rows, 4.2)
    below, beside, show = across(rows)
    marked = []
    for axis, own in each:
        points, curves = dict[Point, list[JSON]](), dict[str, list[Point]]()
        for row in methods(own):
            at, value = (round(statistics.mean(x), 5) for x in zip(*map(show, row["runs"]), strict=True))
            points.setdefault((at, value), []).append(row)
            curves.setdefault(row["title"].partition(",")[0], []).append((at, value))
        for (at, value), same in points.items():
            axis.plot(at, value, "o", color=colour(same[0]), markersize=6)
        for curve in curves.values() if "cut" not in below else ():
            axis.plot(*zip(*sorted(curve), strict=True), color=PALE, zorder=1)
        log_nats(axis)
        axis.margins(x=0.12, y=0.12)
        axis.set(xlabel=below, ylabel=beside if axis is each[0][0] else "")
        axis.grid(visible=True, axis="both")
        marked.append((axis, points))
    FigureCanvasAgg(figure).draw()  # settles the layout, so that labels can be measured
    for axis, points in marked:
        label(axis, points)
    return figure


PLACES = (((7, -3), "left"), ((-7, -3), "right"), ((-4, 7), "left"), ((4, 7), "right"),
          ((-4, -14), "left"), ((4, -14), "right"))  # fmt: skip
"""Where a name may stand beside its point, in points, and which side of it is aligned."""


def label(axis: Axes, points: dict[tuple[float, float], list[JSON]]) -> None:
    """Name every point that has room for it; methods that share a point are counted."""
    taken = [Bbox([at - 4, at + 4]) for at in axis.transData.transform(list(points))]
    frame = axis.get_window_extent()
    for point, (first, *others) in points.items():
        more = f" and {len(others)} other{'s' * (len(others) > 1)}" if others else ""
        name = first["title"].partition(" (")[0] + more
        for offset, side in PLACES:
            style: Any = {"ha": side, "fontsize": 7, "color": colour(first)}
            note = axis.annotate(name, point, offset, textcoords="offset points", **style)
            box = note.get_window_extent().padded(1)
            if box.x1 < frame.x1 and box.x0 > frame.x0 and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            note.remove()


def strips(row: JSON) -> Sequence[tuple[str, float, float]]:
    """What is drawn of a row: layers; or attentions above and feed-forwards below, each half as high."""
    apart = isinstance(row["runs"][0]["removed"][0], str)
    return [("a", -0.19, 6.5), ("f", 0.19, 6.5)] if apart else [("", 0.0, 14.0)]


@styled
def layers(rows: Sequence[JSON], depth: int) -> Figure:
    """Which layers each method removes; the share of its searches that remove a layer is its shade."""
    names = methods(rows)
    figure, each = panels(rows, 0.26 * len(names) + 1.2, sharey=True)
    for axis, own in each:
        for line, row in placed(own, names):
            masks = {run["search_seed"]: set(map(str, run["removed"])) for run in row["runs"]}
            axis.hlines(line, -0.5, depth - 0.5, color=PALE, linewidth=14)
            for kind, shift, width in strips(row):
                shares = [sum(f"{i}{kind}" in gone for gone in masks.values()) for i in range(depth)]
                for share, run in groupby(range(depth), key=shares.__getitem__):
                    first, *others = run
                    ends = first - 0.5, first + len(others) + 0.5
                    shade = share / len(masks)
                    axis.hlines(line + shift, *ends, color=colour(row), alpha=shade, linewidth=width)
        axis.vlines([i + 0.5 for i in range(depth)], -0.5, len(names) - 0.5, color="white", linewidth=1)
        axis.set(xlim=(-0.6, depth - 0.4), xticks=range(0, depth, 3), xlabel="layer")
        axis.spines[:].set_visible(False)
    name_lines(each[0][0], names)
    return figure


def log_nats(axis: Axes) -> None:
    """An axis of divergences with plain labels, few enough to stand apart; logarithmic if they spread."""
    low, high = axis.get_xlim() if axis.get_xscale() == "log" else axis.dataLim.intervalx
    if high < 4 * low:
        axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    else:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1, 3)))
        axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
