"""Fill docs/teacher_cache.md from its files under ``results/``, and draw its figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from scripts.lab.pages import fill, table
from scripts.lab.results import JSON, read
from src.files import write_text
from src.report.figures import AMBER, SLATE, TEAL, styled, svg

PAGE, PICTURE = Path("docs/teacher_cache.md"), Path("docs/figures/teacher_cache.svg")
MB = 1e6
SHADES = {"chunked": TEAL, "whole": AMBER, "cached": TEAL, "live": SLATE, "live int8": AMBER}
PARTS = {
    "teacher_ids": "ids", "teacher_log_probs": "log-probs", "teacher_entropy": "entropy",
    "teacher_log_rest": "rest", "input_ids": "tokens",
}  # fmt: skip


@styled
def picture(cache: JSON, loss: JSON) -> Figure:
    """Bytes by column, memory of the loss, and the recovery step against the cached one."""
    figure = Figure(figsize=(9.2, 3.3), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    stored = [(d, p) for d in ("wide", "demo") if d in cache["bytes"] for p in ("float16", "compact")]
    labels, bottoms = [f"{cache['bytes'][d]['vocabulary']:,}\n{p}" for d, p in stored], [0.0] * len(stored)
    for shade, (column, name) in zip((TEAL, SLATE, AMBER, "#93c5fd", "#cbd5e1"), PARTS.items(), strict=True):
        sizes = [cache["bytes"][d][p]["columns"][column] for d, p in stored]
        left.bar(labels, sizes, 0.7, bottom=bottoms, color=shade, label=name)
        bottoms = [a + b for a, b in zip(bottoms, sizes, strict=True)]
    left.tick_params(axis="x", labelsize=8)
    peaks = {form: [row[form]["peak_bytes"] / MB for row in loss["rows"]] for form in ("whole", "chunked")}
    bars(middle, [row["vocabulary"] for row in loss["rows"]], peaks)
    middle.set_yscale("log")
    middle.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    rows = [row for row in cache["recover"]["cases"] if row["projection"] == "chunked"]
    sources = "cached", "live", "live int8"
    steps = {name: [r["times_the_cached_step"] for r in rows if r["teacher"] == name] for name in sources}
    bars(right, sorted({row["vocabulary"] for row in rows}), steps)
    peak = f"peak of the loss, MB, {loss['tokens']:,} tokens"
    titles = "bytes for each position", peak, "step / cached step"
    for axis, title, columns in zip((left, middle, right), titles, (3, 2, 3), strict=True):
        axis.set_title(title)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns, fontsize=8,
                    handlelength=1, columnspacing=1)  # fmt: skip
    return figure


def bars(axis: Axes, vocabularies: Sequence[int], heights: dict[str, list[float]]) -> None:
    """Bars side by side for each vocabulary."""
    width = 0.8 / len(heights)
    for place, (name, values) in enumerate(heights.items()):
        shift = (place - (len(heights) - 1) / 2) * width
        places = [i + shift for i in range(len(values))]
        axis.bar(places, values, width, label=name, color=SHADES[name])
    axis.set_xticks(range(len(vocabularies)), [f"{v:,}" for v in vocabularies])


def tables(cache: JSON, loss: JSON) -> list[str]:
    """The page's tables."""
    sizes = (
        (f"V = {found['vocabulary']:,}, mean entropy {found['mean_entropy']:.2f}", precision,
         f"**{row['bytes_per_position']:.1f}**", f"{row['columns']['teacher_ids']:.1f}",
         f"{row['columns']['teacher_log_probs']:.1f}", f"{row['added_kl_mean']:.1e}")
        for found in (cache["bytes"][name] for name in ("wide", "demo") if name in cache["bytes"])
        for precision, row in ((name, found[name]) for name in ("float32", "float16", "compact"))
    )  # fmt: skip
    writes = ((name, *(f"{100 * x:+.1f} %" for x in (row["overhead"], *row["range"])))
              for name, row in cache["write"].items() if name in ("demo", "0.6B"))  # fmt: skip
    steps = (
        (f"{row['vocabulary']:,}", row["teacher"], row["projection"], f"{row['tokens_per_cpu_second']:,.0f}",
         f"{row['times_the_cached_step']:.2f}", f"{row['peak_bytes'] / MB:,.0f}")
        for row in cache["recover"]["cases"]
    )  # fmt: skip
    losses = (
        (f"{row['vocabulary']:,}", *(f"{row[form]['peak_bytes'] / MB:,.0f}" for form in ("whole", "chunked")),
         f"**1/{row['memory_ratio']:.0f}**",
         ", ".join(f"{row[form]['cpu_seconds']:.1f}" for form in ("whole", "chunked")),
         f"{row['gradient_error']:.0e}")
        for row in loss["rows"]
    )  # fmt: skip
    return [
        *table("signal | precision | bytes / position | ids | log-probs | added KL, nats", sizes), "",
        *table("teacher | writing costs, beyond its bare forward pass | least | most", writes), "",
        *table("V | teacher | projection | tokens / CPU s | step / cached step | peak memory, MB", steps), "",
        f"The loss on {loss['tokens']:,} tokens, hidden size {loss['hidden']:,}, head trained:", "",
        *table("V | whole, MB | chunked, MB | ratio | CPU s of whole, chunked | gradients differ by", losses),
    ]  # fmt: skip


def main() -> None:
    """Write the figure and the page."""
    cache, loss = read("teacher_cache"), read("loss")
    write_text(PICTURE, svg(picture(cache, loss)))
    fill(PAGE, tables(cache, loss))


if __name__ == "__main__":
    main()
