"""Draw the figures of a report, as SVG.

Colours mean the same everywhere: slate the teacher, amber the cut model, teal the recovered one.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from src.mask import WIDE, Mask

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

P = ParamSpec("P")
T = TypeVar("T")

SLATE, AMBER, TEAL, INK, PALE = "#475569", "#d97706", "#0d9488", "#1e293b", "#e2e8f0"
_OTHERS = ("#7c3aed", "#be123c", "#0369a1", "#4d7c0f")
_STYLE: dict[RcKeyType, Any] = {
    "font.size": 10,
    "text.parse_math": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.edgecolor": "#94a3b8",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid.axis": "y",
    "grid.color": PALE,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "svg.hashsalt": "e3pruner",
    "svg.fonttype": "none",
}


def colours(names: Sequence[str]) -> list[str]:
    """Return a colour for each name: those of this file for their models, and others in turn for the rest."""
    known = {"teacher": SLATE, "cut": AMBER, "recovered": TEAL}
    others = iter(_OTHERS * len(names))
    return [known.get(name) or next(others) for name in names]


def _short(names: Sequence[str], room: int = 24) -> list[str]:
    """Return names that fit under a bar: long ones lose their beginning."""
    return [name if len(name) <= room else "..." + name[3 - room :] for name in names]


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function so that it draws in the style of this file, and changes no setting for others."""

    @wraps(draw)
    def styled(*args: P.args, **keys: P.kwargs) -> T:
        with matplotlib.rc_context(_STYLE):
            return draw(*args, **keys)

    return styled


@styled
def svg(figure: Figure) -> str:
    """Return the SVG text of a figure; equal figures give equal text."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return buffer.getvalue()


def _axes(columns: int, height: float, **keys: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(8.6, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False, **keys)[0])


def mask_strip(mask: Mask) -> Figure:
    """Draw which units a mask keeps: a box for each layer or half, or a map of channels or KV groups."""
    if mask.wide:
        return width_map(mask)
    return layer_strip(mask.num_layers, mask.removed) if mask.unit == "layer" else half_strip(mask)


def _row(axis: Axes, layers: int, removed: Collection[int], bottom: float = 0.0) -> None:
    """Draw a box for each layer, dashed where it is removed."""
    for layer in range(layers):
        gone = layer in removed
        box = FancyBboxPatch(
            (layer + 0.08, bottom), 0.84, 1, boxstyle="round,pad=0,rounding_size=0.12", mutation_aspect=1.2,
            facecolor="white" if gone else TEAL, edgecolor=AMBER if gone else TEAL,
            linestyle=(0, (3, 2)) if gone else "-", linewidth=1.3,
        )  # fmt: skip
        axis.add_patch(box)
        if layers <= 48:
            size = 10 if layers <= 32 else 7
            axis.text(layer + 0.5, bottom + 0.47, str(layer), ha="center", va="center", fontsize=size,
                      color=AMBER if gone else "white", fontweight="bold")  # fmt: skip


@styled
def half_strip(mask: Mask) -> Figure:
    """Draw which attentions and feed-forwards are kept, and join those that make a layer together."""
    figure, (axis,) = _axes(1, 2.3)
    for name, kept, bottom in (("attention", mask.attention, 1.9), ("feed-forward", mask.feed_forward, 0.0)):
        _row(axis, mask.num_layers, {*range(mask.num_layers)} - {*kept}, bottom)
        axis.text(-0.15, bottom + 0.47, name, ha="right", va="center", color=SLATE)
    for above, below in zip(mask.attention, mask.feed_forward, strict=True):
        width = 1.0 if above == below else 2.2
        axis.plot([above + 0.5, below + 0.5], [1.88, 1.02], color=TEAL, linewidth=width)
    axis.set(xlim=(-2.2, mask.num_layers), ylim=(-0.08, 2.98))
    axis.set_title(
        f"From the embedding (left) to the head: {mask.depth} of {mask.num_layers} attentions and "
        f"feed-forwards are kept; a line joins those of one new layer"
    )
    axis.axis("off")
    return figure


@styled
def layer_strip(num_layers: int, removed: Sequence[int]) -> Figure:
    """Draw a box for each layer, dashed if it is removed, from the embedding (left) to the head (right)."""
    figure, (axis,) = _axes(1, 1.15)
    _row(axis, num_layers, removed)
    axis.set(xlim=(0, num_layers), ylim=(-0.08, 1.08))
    axis.set_title(
        f"Layers from the embedding (left) to the head: {num_layers - len(removed)} kept (filled), "
        f"{len(removed)} removed (dashed)"
    )
    axis.axis("off")
    return figure


@styled
def width_map(mask: Mask) -> Figure:
    """Draw which channels or KV groups are kept: a column for each layer, a row for each unit in it."""
    figure, (axis,) = _axes(1, 3.0)
    kept = np.zeros(mask.units)
    kept[list(mask.keep)] = 1.0
    axis.imshow(kept.reshape(mask.num_layers, -1).T, aspect="auto", interpolation="nearest", origin="lower",
                cmap=ListedColormap(["white", TEAL]), vmin=0, vmax=1)  # fmt: skip
    axis.set(
        xlabel="layer", ylabel=WIDE[mask.unit], xticks=range(0, mask.num_layers, 1 + mask.num_layers // 24)
    )
    axis.set_title(f"Each layer keeps {mask.listed.partition(' of each')[0]} (filled)")
    return figure


QUALITIES = {
    "exact_match": ("Exact match", "{:.1%}"),
    "agreement": ("Same first choice as the teacher", "{:.1%}"),
    "kl": ("KL from the teacher, nats", "{:.3f}"),
}
"""Figures of ``evaluate`` that are drawn, each with its title and number format."""


@styled
def quality(names: Sequence[str], models: Sequence[dict[str, Any]], keys: Sequence[str]) -> Figure:
    """Draw the figures ``keys`` (of :data:`QUALITIES`), one panel each, with a bar for every model."""
    figure, axes = _axes(len(keys), 2.7)
    for axis, key in zip(axes, keys, strict=True):
        title, form = QUALITIES[key]
        values = [model[key] for model in models]
        at = range(len(names))
        bars = axis.bar(at, values, tick_label=_short(names), color=colours(names), width=0.62)
        axis.bar_label(bars, [form.format(value) for value in values], padding=3, fontweight="bold")
        axis.set_title(title)
        axis.set(yticks=[], ylim=(0, 1.15 * max([*values, 1e-3])))
        axis.spines["left"].set_visible(False)
    return figure


@styled
def courses(search: Sequence[Sequence[float]], recover: Sequence[Sequence[float]]) -> Figure:
    """Draw how a search's KL and a recovery's loss, of all its terms, fell, from points ``(step, value)``."""
    told = ("Search: KL from the teacher, nats", AMBER, search), ("Recovery: loss", TEAL, recover)
    shown = [(title, colour, history) for title, colour, history in told if history]
    figure, axes = _axes(len(shown), 2.8)
    for axis, (title, colour, history) in zip(axes, shown, strict=True):
        steps, values = np.array(history, dtype=float).T
        window = max(1, len(values) // 20)
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        axis.plot(steps, values, color=colour, alpha=0.28, linewidth=0.9)
        axis.plot(steps[window // 2 :][: len(smooth)], smooth, color=colour, linewidth=2)
        if values.min() > 0 and values.max() > 20 * values.min():
            axis.set_yscale("log")
        axis.set_title(title)
        axis.set(xlabel="step", xlim=(steps[0], max(steps[-1], steps[0] + 1)))
        axis.grid(visible=True)
    return figure


@styled
def gate_map(keep_SL: Sequence[Sequence[float]], of: str = "that a layer is kept") -> Figure:
    """Draw the probabilities ``keep_SL`` at each of S steps of a search, for each of L layers.

    ``of`` says in the title what they are the probability of.
    """
    figure, (axis,) = _axes(1, 3.0)
    steps, layers = len(keep_SL), len(keep_SL[0])
    image = axis.imshow(
        np.array(keep_SL).T, aspect="auto", cmap="viridis", vmin=0, vmax=1, origin="lower",
        interpolation="nearest", extent=(0, steps, -0.5, layers - 0.5),
    )  # fmt: skip
    figure.colorbar(image, ax=axis, fraction=0.03, pad=0.015, ticks=[0, 0.5, 1]).outline.set_visible(False)
    axis.set(xlabel="step", ylabel="layer", yticks=range(0, layers, max(1, layers // 8)))
    axis.set_title(f"Search: probability {of}")
    return figure


@styled
def budgets(curve: Sequence[dict[str, Any]], num_layers: int) -> Figure:
    """Draw the KL of the masks that one search learned for several sizes, against the layers they remove.

    ``curve`` has ``removed`` (number of layers) and ``kl`` (nats) of each mask.
    """
    figure, (axis,) = _axes(1, 2.8)
    removed, values = [each["removed"] for each in curve], [each["kl"] for each in curve]
    axis.plot(removed, values, color=AMBER, linewidth=2, marker="o")
    for x, value in zip(removed, values, strict=True):
        axis.annotate(f"{value:.4f}", (x, value), xytext=(0, 7), textcoords="offset points", ha="center")
    if min(values) > 0 and max(values) > 20 * min(values):
        axis.set_yscale("log")
    axis.margins(x=0.08, y=0.2)
    axis.set_title("KL from the teacher against what is removed, one search")
    axis.set(xlabel=f"layers removed, of {num_layers}", ylabel="nats per token", xticks=removed)
    axis.grid(visible=True)
    return figure


@styled
def speed(names: Sequence[str], measured: Sequence[dict[str, Any]]) -> Figure:
    """Draw the measured speed-up of every student, with quartiles, beside its ideal.

    ``measured`` has for each name what ``benchmark`` measured, by phase (``prefill``, ``decode``).
    """
    figure, axes = _axes(2, 0.9 + 0.5 * len(names), sharex=True)
    furthest = max(m[p]["ideal"] for m in measured for p in ("prefill", "decode"))
    for axis, phase in zip(axes, ("prefill", "decode"), strict=True):
        figures = [m[phase] for m in measured]
        ups = np.array([f["speedup"] for f in figures])
        low, high = np.array([f["speedup_iqr"] for f in figures]).T
        furthest = max(furthest, *high)
        axis.barh(range(len(names)), ups, tick_label=_short(names), color=colours(names), height=0.5)
        axis.errorbar(ups, range(len(names)), xerr=[ups - low, high - ups], fmt="none",
                      ecolor=INK, elinewidth=1, capsize=3)  # fmt: skip
        for row, figure_ in enumerate(figures):
            axis.plot([figure_["ideal"]] * 2, [row - 0.36, row + 0.36], color=INK, linewidth=2)
            axis.text(0.03, row, f"{figure_['speedup']:.2f}x of ideal {figure_['ideal']:.2f}x",
                      va="center", color="white", fontweight="bold", fontsize=9)  # fmt: skip
        axis.axvline(1, color="#94a3b8", linewidth=1, linestyle=(0, (4, 3)))
        axis.set_title(f"{phase.capitalize()} speed-up over the teacher")
        axis.invert_yaxis()
    axes[1].set_yticks([])
    axes[0].set_xlim(0, 1.06 * furthest)
    return figure


@styled
def cost(tokens: dict[str, float], seconds: dict[str, float]) -> Figure:
    """Draw what each stage cost: its number of ``tokens`` and of ``seconds``, both by the stage's name."""
    panels = [("Tokens", tokens, tokens_text), ("Seconds", seconds, "{:,.0f} s".format)]
    panels = [panel for panel in panels if panel[1]]
    bars = max(len(values) for _, values, _ in panels)
    figure, axes = _axes(len(panels), 0.8 + 0.38 * bars)
    for axis, (title, values, text) in zip(axes, panels, strict=True):
        shades = [SLATE if name.startswith("teacher") else TEAL for name in values]
        drawn = axis.barh(list(values), list(values.values()), color=shades, height=0.58)
        axis.bar_label(drawn, [text(value) for value in values.values()], padding=4)
        axis.set_title(title)
        axis.set(xticks=[], xlim=(0, 1.3 * max([*values.values(), 1e-9])))
        axis.spines["bottom"].set_visible(False)
        axis.invert_yaxis()
    return figure


def tokens_text(count: float) -> str:
    """Return a count of tokens in few characters: 960, 12.3 k, 4.56 M, 1.20 B."""
    for unit, name in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:.0f}"
