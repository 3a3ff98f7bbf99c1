"""Fill the README's results from ``results/*.json``, and draw its figures: ``make results``.

Nothing is typed by hand: what stands between the markers comes from the files.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from functools import reduce
from pathlib import Path
from textwrap import shorten

import yaml
from matplotlib.figure import Figure

from scripts.arena import cells
from scripts.arena.figures import draw
from scripts.arena.stages import mask as named_mask
from scripts.arena.table import page
from scripts.lab.pages import fill, made, table
from scripts.lab.results import JSON, read
from src.benchmark import PHASES
from src.files import write_text
from src.mask import Mask
from src.report.compare import tables, turned
from src.report.figures import AMBER, INK, SLATE, TEAL, half_strip, styled, svg, tokens_text
from src.report.pages import table_of
from src.units.kinds import KINDS
from src.vision import verb as vision

HALVES = (0, 1, 2, 5, 6, 7, 8, 11, 12, 13, 14, 15, 16, 19, 20, 21, 22, 23)
"""The mask by hand of docs/units.md, of 12 layers: no result, an example."""
PUBLIC = "**A real model**, [SmolLM2-135M-Instruct](docs/public_model.md) from 4-bit weights, on WikiText-2:"
SHOWN = ("layers", "parameters", "held-out KL, nats", "perplexity", "decode, tokens/s")
OUTCOMES, MISSING = ("pass", "refused", "cannot be built", "WRONG"), "not measured yet"


def spent(demo: JSON, run: JSON) -> float:
    """Text that search and recovery read, as a share of the teacher's own training tokens."""
    tokens: int = run.get("distinct_tokens", run["search"]["tokens"] + run["recovery"]["tokens"])
    return tokens / demo["teacher"]["training_tokens"]


@styled
def curve(once: JSON, again: JSON) -> Figure:
    """Recovered exact match, a median over seeds, against the share of the teacher's text that was spent."""
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    axes = figure.subplots()
    halves = [row for row in again["rows"] if row["variant"].startswith("halves")]
    layers = [row for row in again["rows"] if row not in halves]
    for name, shade, rows in (
        ("again and again, recombined", AMBER, halves), ("few rows again and again", TEAL, layers),
        ("each row read once", SLATE, once["rows"]),
    ):  # fmt: skip
        points = [(100 * spent(once, row["runs"][0]), 100 * statistics.median(scores(row))) for row in rows]
        if points := sorted(points):
            axes.plot(*zip(*points, strict=True), "o-", color=shade, label=name)
    for judged in (once["teacher"], once["rows"][0]["runs"][0]["cut"]):
        axes.axhline(100 * judged["exact_match"], color=SLATE, linestyle="--")
    axes.set(xscale="log", ylabel="exact match, %")
    shares = sorted({float(row["title"].split()[0]) for row in (*once["rows"], *again["rows"])})
    axes.set_xticks(shares, [f"{share:g} %" for share in shares])
    axes.minorticks_off()
    axes.set_xlabel("distinct tokens of search + recovery, of the teacher's own training tokens", color=INK)
    axes.legend(frameon=False, title="dashed: the teacher, and its cut before recovery")
    axes.grid(visible=True, axis="y")
    return figure


def scores(row: JSON) -> list[float]:
    """Exact match of the recovered model, a share, for each seed."""
    return [run["recovered"]["exact_match"] for run in row["runs"]]


def main() -> None:
    """Fill the pages, and draw the figures of the README and of docs/units.md."""
    parts = {"headline": text_lines, "read_once": text_lines, "public_model_25_report": public_lines,
             "mask_quality": mask_lines, "search_step": step_lines,
             "export_matrix": lambda x: [f"**Export.** {counted(x)}"], "fair_fight": fight_lines}  # fmt: skip
    lines = [["", *make(found)] for name, make in parts.items() if (found := read(name))]
    write_text("docs/figures/headline.svg", svg(curve(read("read_once"), read("headline"))))
    example = Mask("any", 12, HALVES, "by hand", unit="half")
    write_text("docs/figures/recombined.svg", svg(half_strip(example)))
    fill(Path("README.md"), [line for part in lines for line in part][1:])
    for name, make, about, part in (
        ("data_pipeline", data_lines, "data", "results"), ("export_matrix", matrix_lines, "export", "matrix"),
        ("interop", judged_lines, "interop", "results"), ("quantised", judged_lines, "interop", "quantised"),
        ("harder", judged_lines, "headline", "harder"), ("on_policy", judged_lines, "recovery", "on policy"),
        ("width_speed", speed_lines, "width", "speed"),
        ("width_speed_stories", speed_lines, "width", "speed of stories"),
        ("vision", vision_lines, "systems/prune_and_merge", "vision"),
        *((f"public_model_{run}_held_out", judged_lines, "public_model", f"held out {run}")
          for run in ("22", "22-s1", "22-s2", "25", "25-s1", "25-s2")),
        *((f"public_{x}", compared_lines, "public_model", x)
          for x in ("contest", "losses", "recipes", "seeds_22", "seeds_25")),
    ):  # fmt: skip
        if found := read(name):
            fill(Path(f"docs/{about}.md"), make(found), part)
    related(yaml.safe_load(Path("docs/systems/table.yaml").read_text()))
    for name in ("fair_fight", "ablations", "linear_patch"):
        if isinstance((results := read(name)).get("rows"), list):
            page(Path(f"docs/{name}.md"), results, draw(results, Path("docs/figures")))


def related(systems: list[JSON]) -> None:
    """Fill the table of related systems, and those of their own pages."""
    rows = []
    for told in systems:
        name, page = told["system"], f"systems/{told['page']}.md"
        found = {part: re.sub(r"\{(.+?)\}", figure, text) for part, text in told["measured"].items()}
        cells = (f"{part}: {MISSING if MISSING in text else text}" for part, text in found.items())
        about = (told[key] for key in ("claims", "built", "ours"))
        rows.append([f"[{name}]({page})", *about, "; ".join(cells), f"`{told['command']}`"])
        if "table" in told:
            fill(Path("docs", page), re.sub(r"\{(.+?)\}", figure, told["table"]).splitlines())
    head = "system | the paper claims | built here | ours | measured here | command"
    fill(Path("docs/systems.md"), table(head, rows))


def figure(asked: re.Match[str]) -> str:
    """What ``{file key=value,... path format}`` asks for: the mean over these rows of a results file."""
    name, which, path, form = asked[1].split()
    keys, found = dict(part.split("=") for part in which.split(",")), read(name)
    rows = found.get("models") or found.get("rows", [])
    mine = (row for row in rows if all(str(row[key]) == value for key, value in keys.items()))
    values = [reduce(lambda at, s: at[int(s) if s.isdigit() else s], path.split("."), row) for row in mine]
    return format(statistics.mean(values), form) if values else MISSING


def mask_lines(masks: JSON) -> list[str]:
    """The learned masks beside every mask there is."""
    best, halves = masks["best"]["kl"], masks["halves"]
    ratios, theirs = (", ".join(f"{x['ratio_to_best']:.3f}" for x in p["learned"]) for p in (masks, halves))
    found = named_mask(masks["teacher"], halves["best"]["removed"].split())
    write_text("docs/figures/halves.svg", svg(half_strip(found)))
    return [
        f"**Recombined cuts.** Demo's teacher, {found.depth} of {found.num_layers} layers, not recovered: "
        f"held-out KL {halves['best']['kl']:.4f} for the best of all {halves['masks']:,} recombined cuts, "
        f"{best:.4f} for the best of all {masks['masks']:,} cuts of whole layers: "
        f"{1 - halves['best_over_best_layer']:.0%} less. The learned cut over the best, per seed: {theirs}. "
        f"`make mask-quality`.",
        "",
        f"**Masks.** Held-out KL of the learned mask over the best of all {masks['masks']:,} masks, "
        f"per seed: {ratios}. The median mask has {masks['median_kl'] / best:.0f} times the best KL, "
        f"best contiguous {masks['best_contiguous']['kl'] / best:.2f} times. `make mask-quality`.",
    ]


def step_lines(step: JSON) -> list[str]:
    """The search step against the naive one."""
    ours = next(row for name, row in reversed(step["variants"].items()) if "another loss" not in name)
    return [
        f"**Search step.** {ours['speedup']:.1f} times faster than the naive step at equal gate gradient "
        f"(they differ by {ours['gradient_error']:.0e} of its size); vocabulary 32,000, 16 layers, "
        f"256 tokens. `make search-step`."
    ]


def data_lines(pipeline: JSON) -> list[str]:
    """The loader alone on every corpus, and what a recovery waits."""
    rows = (
        (name, f"{row['tokens'] / 1e6:.2f} M", f"{row['tokens_per_core_second'] / 1e3:,.0f} k",
         f"{row['waste']:.1%}", f"{row['truncated']:,.0f}", f"{row['dropped']:,.0f}")
        for name, row in pipeline["loader"].items()
    )  # fmt: skip
    waits = ", ".join(f"{row['waiting']:.1%} with {row['workers']} workers" for row in pipeline["recovery"])
    rate = max(row["tokens_per_core_second"] for row in pipeline["recovery"])
    return [
        *table("corpus | tokens | tokens/s of one core | padding | cut | left out", rows), "",
        f"The demo's recovery consumes {rate / 1e3:.1f} k tokens a second of one core; the loader alone is "
        f"{pipeline['loader_over_recovery']:.0f} times as fast; of its time the recovery waits {waits}. "
        + made(pipeline),
    ]  # fmt: skip


def judged_lines(found: JSON) -> list[str]:
    """What ``evaluate --out`` wrote: each model beside the teacher."""
    rows, keys = list[list[str]](), ("exact_match", "agreement", "kl")
    for row in (found["teacher"], *found["models"]):
        flips = "{lost} / {gained}".format(**row["flips"]) if "flips" in row else "-"
        ends = " [{:.4g}, {:.4g}]".format(*row["kl_interval"]) if "kl_interval" in row else ""
        *told, kl = (f"{row[key]:.4g}" if key in row else "-" for key in keys)
        rows.append([row["path"], *told, kl + ends, flips])
    every = zip(("model", "exact match", "agreement", "KL", "lost / gained"), *rows, strict=True)
    head, *rows = map(list, zip(*(column for column in every if {*column[1:]} != {"-"}), strict=True))
    return [*table(" | ".join(head), rows), "", f"`{found['command']}`"]


def compared_lines(found: JSON) -> list[str]:
    """What ``compare --json`` wrote: a row for each run."""
    head, *rows = turned(tables(found))[0]
    return [*table(" | ".join(head), rows), "", f"`{found['command']}`"]


def speed_lines(found: JSON) -> list[str]:
    """What ``benchmark --out`` wrote: speed-ups of what the operations promise."""
    told = "{speedup:.2f} of {ideal:.2f}".format
    rows = ([m["path"], *(told(**m[phase]) for phase in PHASES)] for m in found["measured"][1:])
    return [*table(" | ".join(["times as fast", *PHASES]), rows), "", f"`{found['command']}`"]


def vision_lines(found: JSON) -> list[str]:
    """Tokens of a vision transformer, pruned and merged."""
    return [*table(vision.HEAD, vision.cells(found)), "", made(found)]


def counted(matrix: JSON) -> str:
    """Families by result, for each kind of unit."""
    told = []
    for unit in KINDS:
        counts = Counter(row[unit]["result"] for row in matrix["families"].values())
        told.append(f"{unit}: " + ", ".join(f"{counts[x]} {x}" for x in OUTCOMES if counts[x]))
    version = f"transformers {matrix['transformers']}"
    return f"Of {len(matrix['families'])} decoder families of {version}; {'; '.join(told)}."


def matrix_lines(matrix: JSON) -> list[str]:
    """Every family with its result for each kind of unit, and its limits or the reasons."""
    rows = []
    for family, row in sorted(matrix["families"].items()):
        told = dict[str, list[str]]()
        for unit, cell in row.items():
            told.setdefault(cell.get("reason") or cell.get("limits", ""), []).append(unit)
        why = [f"{', '.join(units)}: {shorten(t, 200, placeholder=' ...')}" for t, units in told.items() if t]
        rows.append([family, *(row[unit]["result"] for unit in KINDS), " ".join(why)])
    return [counted(matrix), "", *table(" | ".join(["family", *KINDS, "limits, or the reason"]), rows)]


def public_lines(report: JSON) -> list[str]:
    """The public model in short: the report without its costs."""
    head, *rows = table_of(report)
    told = (row for row in rows if row[0] in SHOWN or row[0].endswith(", acc"))
    return [PUBLIC, "", *table(" | ".join(head), told)]


def fight_lines(fight: JSON, ratio: float = 0.25) -> list[str]:
    """The fair fight in short: each method at one ratio, best first before recovery."""
    rows = [row for row in fight["rows"] if row["ratio"] == ratio and "recovered" in row]
    tokens = statistics.median(run["recovery"]["tokens"] for row in rows for run in row["runs"])
    cost = cells.cost("search", lambda search: search["metrics"]["forward_tokens"], tokens_text)
    columns = cells.method, cells.nats("cut"), cells.percent("cut"), cells.percent("recovered"), cost
    ranked = sorted(rows, key=lambda row: float(row["cut"]["kl"]["value"]))
    head = "method | KL of the cut, nats | exact match of the cut | recovered | search, forward tokens"
    return [
        f"**The fair fight.** {ratio:.0%} of the layers, every method with the same recovery on "
        f"{tokens_text(tokens)} tokens; 95 % intervals, which overlap for most methods after it.", "",
        *table(head, ([cell(row) for cell in columns] for row in ranked)), "",
        "More ratios, costs and verdicts: [docs/fair_fight.md](docs/fair_fight.md). `make fair-fight`.",
    ]  # fmt: skip


def text_lines(results: JSON) -> list[str]:
    """Table of exact match against text read: again and again (the demo's recipe), or once."""
    teacher, rows = results["teacher"], []
    for row in sorted(results["rows"], key=lambda row: spent(results, row["runs"][0])):
        each = f" ({', '.join(f'{100 * score:.1f}' for score in scores(row))})" if row["runs"][1:] else ""
        tokens = statistics.median(spent(results, run) * teacher["training_tokens"] for run in row["runs"])
        passes = statistics.median(run["search"]["tokens"] + run["recovery"]["tokens"] for run in row["runs"])
        rows.append((f"{row['title']} ({tokens_text(tokens)} / {tokens_text(passes)})",
            f"**{100 * statistics.median(scores(row)):.1f} %**{each}",
            f"{100 * teacher['exact_match']:.1f} %", f"{100 * row['runs'][0]['cut']['exact_match']:.1f} %",
        ))  # fmt: skip
    again = results["name"] == "headline"
    how = "Read again and again, the demo's recipe" if again else "Each row read once, by distillation alone"
    return [
        f"**{how}.** Exact match on {teacher['problems']:,} problems, median of seeds: `make headline`", "",
        *table("text read (distinct tokens / all readings) | recovered | teacher | cut, not recovered", rows),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
