"""Fill the README's results from ``results/*.json``, and draw its figures: ``make results``.

Nothing is typed by hand: what stands between the markers comes from the files.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from scripts.arena import cells
from src.files import write_text
from src.report.figures import AMBER, INK, SLATE, TEAL, layer_strip, svg, tokens_text

RESULTS, README = Path("results"), Path("README.md")
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def read(name: str) -> dict[str, Any]:
    """A results file, empty if it was never made."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def exact(run: dict[str, Any], model: str) -> float:
    """Exact match of one model of a run, in percent."""
    return 100 * run["scores"][model]["exact_match"]


def curve(demo: dict[str, Any]) -> Figure:
    """Recovered exact match against the share of the teacher's training tokens that was spent."""
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    axes = figure.subplots()
    runs = demo["runs"]
    for seed in sorted({run["seed"] for run in runs}):
        points = sorted((100 * r["share"], exact(r, "recovered")) for r in runs if r["seed"] == seed)
        axes.plot(
            *zip(*points, strict=True),
            "o-",
            color=TEAL,
            alpha=0.9 if len(points) > 1 else 0.5,
            label="recovered" if len(points) > 1 else None,
        )
    axes.axhline(exact(runs[0], "teacher"), color=SLATE, linestyle="--", label="teacher, 16 layers")
    axes.axhline(exact(runs[0], "cut"), color=AMBER, linestyle=":", label="12 layers, not recovered")
    axes.set_xscale("log")
    axes.set_xticks(ticks := sorted({round(run["percent"], 1) for run in runs}), [f"{t:g} %" for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("tokens of search + recovery, of the teacher's own training tokens", color=INK)
    axes.set_ylabel("exact match, %")
    axes.legend(loc="lower right", frameon=False)
    return figure


def main() -> None:
    """Write the figure and the README's table."""
    demo, masks, step = read("demo"), read("mask_quality"), read("search_step")
    lines = []
    if demo:
        lines += demo_lines(demo)
    if masks:
        best = masks["best"]["kl"]
        ratios = ", ".join(f"{row['ratio_to_best']:.3f}" for row in masks["learned"])
        lines += [
            "",
            f"**Masks.** Held-out KL of the learned mask over the best of all {masks['masks']:,} masks, "
            f"per seed: {ratios}. The median mask has {masks['median_kl'] / best:.0f} times the best KL, "
            f"best contiguous {masks['best_contiguous']['kl'] / best:.2f} times. `make mask-quality`.",
        ]
    if step:
        ours = next(row for name, row in step["variants"].items() if "shared teacher" in name)
        lines += [
            "",
            f"**Search step.** {ours['speedup']:.1f} times faster than the naive step at equal gate gradient "
            f"(they differ by {ours['gradient_error']:.0e} of its size); vocabulary 32,000, 16 layers, "
            f"256 tokens. `make search-step`.",
        ]
    matrix = read("export_matrix")
    if matrix:
        lines += ["", f"**Export.** {families(matrix)} `docs/export.md` has the table."]
    if fight := read("fair_fight"):
        lines += ["", *fight_lines(fight)]
    fill(README, lines)
    if pipeline := read("data_pipeline"):
        fill(Path("docs/data.md"), data_lines(pipeline))


def fill(page: Path, lines: list[str]) -> None:
    """Put lines between the markers of a page."""
    head, rest = page.read_text().split(BEGIN)
    write_text(page, f"{head}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{rest.split(END)[1]}")


def data_lines(pipeline: dict[str, Any]) -> list[str]:
    """The loader alone on every corpus, and what a recovery waits."""
    lines = [
        "| corpus | tokens | tokens/s of one core | padding | cut | left out |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in pipeline["loader"].items():
        lines.append(
            f"| {name} | {row['tokens'] / 1e6:.2f} M | {row['tokens_per_core_second'] / 1e3:,.0f} k | "
            f"{row['waste']:.1%} | {row['truncated']:,.0f} | {row['dropped']:,.0f} |"
        )
    waits = ", ".join(f"{row['waiting']:.1%} with {row['workers']} workers" for row in pipeline["recovery"])
    rate = max(row["tokens_per_core_second"] for row in pipeline["recovery"])
    return [
        *lines,
        "",
        f"The demo's recovery consumes {rate / 1e3:.1f} k tokens a second of one core; the loader alone is "
        f"{pipeline['loader_over_recovery']:.0f} times as fast; of its time the recovery waits {waits}. "
        f"`{pipeline['command']}`, commit {pipeline['commit']}.",
    ]


def families(matrix: dict[str, Any]) -> str:
    """How many families pass the export gate."""
    counts = Counter(row["result"] for row in matrix["families"].values())
    told = ", ".join(f"{count} {result}" for result, count in counts.most_common())
    return f"Of {counts.total()} decoder families of transformers {matrix['transformers']}: {told}."


def fight_lines(fight: dict[str, Any], ratio: float = 0.25) -> list[str]:
    """The fair fight in short: each method at one ratio, best first before recovery."""
    rows = [row for row in fight["rows"] if row["ratio"] == ratio and "recovered" in row]
    tokens = statistics.median(run["recovery"]["tokens"] for row in rows for run in row["runs"])
    lines = [
        f"**The fair fight.** {ratio:.0%} of the layers, every method with the same recovery on "
        f"{tokens_text(tokens)} tokens; 95 % intervals.",
        "",
        "| method | KL of the cut, nats | exact match of the cut | recovered | search, forward tokens |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: float(row["cut"]["kl"]["value"])):
        spent = statistics.median(run["search"]["metrics"]["forward_tokens"] for run in row["runs"])
        cut, recovered = (cells.percent(stage)(row) for stage in ("cut", "recovered"))
        lines.append(
            f"| {cells.method(row)} | {cells.nats('cut')(row)} | {cut} | {recovered} | {tokens_text(spent)} |"
        )
    return [
        *lines,
        "",
        "More ratios, costs and verdicts: [docs/fair_fight.md](docs/fair_fight.md). `make fair-fight`.",
    ]


def demo_lines(demo: dict[str, Any]) -> list[str]:
    """Table of the headline, and its figure."""
    figures = Path("docs/figures")
    figures.mkdir(parents=True, exist_ok=True)
    write_text(figures / "headline.svg", svg(curve(demo)))
    removed = demo["runs"][0]["removed"]
    write_text(figures / "layers.svg", svg(layer_strip(16, removed)))
    lines = [
        "| tokens spent, of the teacher's training | recovered | teacher | cut, not recovered | seeds |",
        "|---|---|---|---|---|",
    ]
    for percent in sorted({run["percent"] for run in demo["runs"]}):
        runs = [run for run in demo["runs"] if run["percent"] == percent]
        scores = [exact(run, "recovered") for run in runs]
        each = f" ({', '.join(f'{s:.1f}' for s in scores)})" if len(scores) > 1 else ""
        tokens = tokens_text(statistics.median(run["tokens"] for run in runs))
        lines.append(
            f"| {percent:g} % ({tokens}) | **{statistics.median(scores):.1f} %**{each} "
            f"| {exact(runs[0], 'teacher'):.1f} % | {exact(runs[0], 'cut'):.1f} % | {len(runs)} |"
        )
    problems = demo["runs"][0]["problems"]
    note = f"Exact match on {problems} test problems; median over seeds, all in brackets. `make headline`."
    return [*lines, "", note]


if __name__ == "__main__":
    main()
