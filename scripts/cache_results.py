"""Fill docs/teacher_cache.md from its files under ``results/``, and draw its figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from scripts.readme_results import BEGIN, END, read
from src.files import write_text
from src.report.figures import AMBER, SLATE, TEAL, svg

PAGE, PICTURE = Path("docs/teacher_cache.md"), Path("docs/figures/teacher_cache.svg")
MB = 1e6
PARTS = {
    "teacher_ids": "ids",
    "teacher_log_probs": "log-probs",
    "teacher_entropy": "entropy",
    "teacher_log_rest": "rest",
    "input_ids": "tokens",
}


def picture(cache: dict[str, Any], loss: dict[str, Any]) -> Figure:
    """Bytes by column, memory of the loss, and the recovery step against the cached one."""
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    bars = [(d, p) for d in ("wide", "demo") if d in cache["bytes"] for p in ("float16", "compact")]
    labels, bottoms = [f"{cache['bytes'][d]['vocabulary']:,}\n{p}" for d, p in bars], [0.0] * len(bars)
    for shade, (column, name) in enumerate(PARTS.items()):
        sizes = [cache["bytes"][d][p]["columns"][column] for d, p in bars]
        left.bar(labels, sizes, bottom=bottoms, color=(TEAL, SLATE, AMBER, "#9ad", "#ccc")[shade], label=name)
        bottoms = [a + b for a, b in zip(bottoms, sizes, strict=True)]
    left.set_title("bytes for each position")
    left.legend(frameon=False, fontsize=7)
    names = [f"{row['vocabulary']:,}" for row in loss["rows"]]
    for form, colour, shift in (("whole", AMBER, -0.2), ("chunked", TEAL, 0.2)):
        heights = [row[form]["peak_bytes"] / MB for row in loss["rows"]]
        middle.bar([i + shift for i in range(len(names))], heights, 0.4, color=colour, label=form)
    middle.set_xticks(range(len(names)), names)
    middle.set_yscale("log")
    middle.set_title(f"peak memory of the loss, MB ({loss['tokens']:,} tokens)")
    middle.legend(frameon=False)
    rows = [row for row in cache["recover"]["cases"] if row["projection"] == "chunked"]
    vocabularies = sorted({row["vocabulary"] for row in rows})
    for source, colour, shift in (("cached", TEAL, -0.25), ("live", SLATE, 0), ("live int8", AMBER, 0.25)):
        heights = [row["times_the_cached_step"] for row in rows if row["teacher"] == source]
        right.bar([i + shift for i in range(len(vocabularies))], heights, 0.25, color=colour, label=source)
    right.set_xticks(range(len(vocabularies)), [f"{v:,}" for v in vocabularies])
    right.set_title("recovery step / cached step")
    right.legend(frameon=False)
    return figure


def tables(cache: dict[str, Any], loss: dict[str, Any]) -> list[str]:
    """The page's tables."""
    lines = [
        "| signal | precision | bytes / position | ids | log-probs | added KL, nats |",
        "|---|---|---|---|---|---|",
    ]
    for name in ("wide", "demo"):
        rows = cache["bytes"].get(name, {})
        for precision in ("float32", "float16", "compact") if rows else ():
            row = rows[precision]
            lines.append(
                f"| V = {rows['vocabulary']:,}, mean entropy {rows['mean_entropy']:.2f} | {precision} | "
                f"**{row['bytes_per_position']:.1f}** | {row['columns']['teacher_ids']:.1f} | "
                f"{row['columns']['teacher_log_probs']:.1f} | {row['added_kl_mean']:.1e} |"
            )
    lines += [
        "",
        "| teacher | writing costs, beyond its bare forward pass | range of repeats |",
        "|---|---|---|",
    ]
    for name in ("demo", "0.6B"):
        row = cache["write"][name]
        low, high = (f"{100 * x:+.1f} %" for x in row["range"])
        lines.append(f"| {name} | **{100 * row['overhead']:+.1f} %** | {low} to {high} |")
    lines += ["", "| V | teacher | projection | tokens / CPU s | step / cached step | peak memory, MB |"]
    lines.append("|---|---|---|---|---|---|")
    for row in cache["recover"]["cases"]:
        lines.append(
            f"| {row['vocabulary']:,} | {row['teacher']} | {row['projection']} | "
            f"{row['tokens_per_cpu_second']:,.0f} | {row['times_the_cached_step']:.2f} | "
            f"{row['peak_bytes'] / MB:,.0f} |"
        )
    lines += ["", f"The loss on {loss['tokens']:,} tokens, hidden size {loss['hidden']:,}, head trained:"]
    lines += ["", "| V | whole, MB | chunked, MB | ratio | CPU s, whole and chunked | gradients differ by |"]
    lines.append("|---|---|---|---|---|---|")
    for row in loss["rows"]:
        whole, chunked = row["whole"], row["chunked"]
        peaks = " | ".join(f"{form['peak_bytes'] / MB:,.0f}" for form in (whole, chunked))
        lines.append(
            f"| {row['vocabulary']:,} | {peaks} | "
            f"**1/{row['memory_ratio']:.0f}** | {whole['cpu_seconds']:.1f}, {chunked['cpu_seconds']:.1f} | "
            f"{row['gradient_error']:.0e} |"
        )
    if "weights" in cache:
        weights = cache["weights"]
        lines += [
            "",
            f"| entropy weight ({weights['steps']} steps) | exact match, % | KL, nats |",
            "|---|---|---|",
        ]
        for name, row in weights["table"].items():
            match, kl = row["exact_match"], row["kl"]
            lines.append(
                f"| {name} | {100 * match['mean']:.1f} ± {100 * (match['sd'] or 0):.1f} | "
                f"{kl['mean']:.4f} ± {kl['sd'] or 0:.4f} |"
            )
    return lines


def main() -> None:
    """Write the figure and the page."""
    cache, loss = read("teacher_cache"), read("loss")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    write_text(PICTURE, svg(picture(cache, loss)))
    page = PAGE.read_text()
    head, tail = page[: page.index(BEGIN) + len(BEGIN)], page[page.index(END) :]
    write_text(PAGE, "\n".join([head, *tables(cache, loss), tail]))


if __name__ == "__main__":
    main()
