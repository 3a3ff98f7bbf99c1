"""Fill docs/teacher_cache.md from its files under ``results/``, and draw its figure."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from scripts.lab.pages import fill, table
from scripts.lab.results import JSON, read
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


def picture(cache: JSON, loss: JSON) -> Figure:
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


def tables(cache: JSON, loss: JSON) -> list[str]:
    """The page's tables."""
    sizes = (
        (f"V = {found['vocabulary']:,}, mean entropy {found['mean_entropy']:.2f}", precision,
         f"**{row['bytes_per_position']:.1f}**", f"{row['columns']['teacher_ids']:.1f}",
         f"{row['columns']['teacher_log_probs']:.1f}", f"{row['added_kl_mean']:.1e}")
        for found in (cache["bytes"][name] for name in ("wide", "demo") if name in cache["bytes"])
        for precision, row in ((name, found[name]) for name in ("float32", "float16", "compact"))
    )  # fmt: skip
    writes = (
        (name, f"**{100 * row['overhead']:+.1f} %**", " to ".join(f"{100 * x:+.1f} %" for x in row["range"]))
        for name, row in ((name, cache["write"][name]) for name in ("demo", "0.6B"))
    )
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
        *table("teacher | writing costs, beyond its bare forward pass | range of repeats", writes), "",
        *table("V | teacher | projection | tokens / CPU s | step / cached step | peak memory, MB", steps), "",
        f"The loss on {loss['tokens']:,} tokens, hidden size {loss['hidden']:,}, head trained:", "",
        *table(
            "V | whole, MB | chunked, MB | ratio | CPU s, whole and chunked | gradients differ by", losses
        ),
    ]  # fmt: skip


def main() -> None:
    """Write the figure and the page."""
    cache, loss = read("teacher_cache"), read("loss")
    write_text(PICTURE, svg(picture(cache, loss)))
    fill(PAGE, tables(cache, loss))


if __name__ == "__main__":
    main()
