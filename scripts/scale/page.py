"""Fill docs/scale.md from ``results/strategies.json``; the text around the tables is written by hand."""

from __future__ import annotations

from pathlib import Path

from scripts.lab.pages import fill, made, table
from scripts.lab.results import JSON
from src.report.figures import tokens_text

GIB = 2**30


def converge(section: JSON) -> list[str]:
    """KL of the plain answer over the best known, against the number of steps."""
    depths = section["depths"]
    titles = [row["title"] for row in depths[0]["searches"]]
    rows = []
    for title in titles:
        found = [next(r for r in depth["searches"] if r["title"] == title) for depth in depths]
        cells = [f"{r['ratio_to_best']:.2f} ({tokens_text(r['forward_tokens'])})" for r in found]
        rows.append([title, *cells])
    enough = ["none" if (n := depth["converged_after"]) is None else n for depth in depths]
    rows.append([f"steps until within {section['near']:g} of the best", *enough])
    head = " | ".join(["search", *(f"{d['removed']} of {d['layers']} layers" for d in depths)])
    return table(head, rows)


def grow(section: JSON) -> list[str]:
    """Measured seconds of a step beside its operations, both as multiples of the base."""
    rows = []
    for axis, points in section["sweeps"].items():
        for p in points:
            measured = f"{p['times_base']:.2f}", f"{p['operations_times_base']:.2f}"
            rows.append([axis, p[axis], f"{p['seconds']:.3f}", *measured])
    return table("axis | value | CPU s a step | times the base | operations, times the base", rows)


def plans(section: JSON) -> list[str]:
    """Memory and hours of large models."""
    rows = []
    for case in section["cases"]:
        way = case["way"]
        told = ["does not fit", "-", "-"] if way is None else [
            f"{way['teacher']}, {way['strategy']}{', recomputed' if way['checkpoint_activations'] else ''}",
            f"{way['total'] / GIB:,.1f}", f"{way['hours']:,.1f}",
        ]  # fmt: skip
        share = f"{case['parameters']['parent'] / 1e9:,.1f} B"
        rows.append([case["model"], share, case["stage"], f"{case['ranks']} x {case['device']}", *told])
    return table("model | weights | stage | devices | teacher and strategy | GiB a rank | hours", rows)


def teachers(section: JSON) -> list[str]:
    """Recovered scores from quantised teachers."""
    rows = [[r["teacher"], str(r["seed"]), f"{100 * r['exact_match']:.2f}"] for r in section["runs"]]
    gap = 100 * section["int8_minus_float32"]
    note = (f"Recovered from int8 less recovered from float32, mean over seeds: {gap:+.2f} points on "
            f"{section['problems']:,} problems; the teacher: {100 * section['teacher']:.2f} %.")  # fmt: skip
    return [*table("teacher | seed | recovered demo, exact match %", rows), "", note]


def signals(section: JSON) -> list[str]:
    """Signals of quantised teachers beside float32."""
    told = "{kl:.1e} nats; first choice the same for {agreement:.2%}"
    rows = [[form, told.format(**f) if "kl" in f else "refused"] for form, f in section["forms"].items()]
    return table("teacher | KL from float32", rows)


def equality(section: JSON) -> list[str]:
    """Drift between one process and two."""
    rows = [[name, f"{gap['max']:.1e}", f"{gap['mean']:.1e}"] for name, gap in section["drift"].items()]
    return table(f"stage, overlay, figure ({section['steps']} steps) | largest difference | mean", rows)


def write(results: JSON, page: Path) -> None:
    """Put each section's table between its markers ``<!-- name -->`` and ``<!-- /name -->``."""
    for make in (converge, grow, plans, teachers, equality, signals):
        if section := results.get(make.__name__):
            fill(page, [*make(section), "", made(section)], make.__name__)
