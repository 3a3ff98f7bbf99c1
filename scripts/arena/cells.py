"""Cells of the tables: each function makes a column's function from a row of the results to text."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from textwrap import shorten

from scripts.lab.results import JSON as JSON

Cell = Callable[[JSON], str]


def at(record: JSON, stage: str) -> JSON:
    """What is known of a row or run at a stage; of the cut model where it was not recovered."""
    return record[stage] if stage in record else record["cut"]


def method(row: JSON) -> str:
    """The variant; the reference in bold."""
    return f"**{row['title']}**" if row["variant"] == row["reference"] else row["title"]


def percent(stage: str) -> Cell:
    """Exact match of a stage with its interval."""
    return lambda row: ranged(at(row, stage)["exact_match"], 100, 1, " %")


def nats(stage: str) -> Cell:
    """Divergence of a stage with its interval."""
    return lambda row: ranged(at(row, stage)["kl"], 1, 4)


def mean(stage: str, show: Callable[[JSON], float], form: str) -> Cell:
    """Mean of a figure over the seeds."""
    return lambda row: form.format(statistics.mean(show(at(run, stage)) for run in row["runs"]))


def lost_gained(stage: str) -> Cell:
    """Problems lost and gained against the teacher, means over the seeds."""

    def cell(row: JSON) -> str:
        each = [at(run, stage)["flips"] for run in row["runs"]]
        return " / ".join(f"{statistics.mean(flip[key] for flip in each):.3g}" for key in ("lost", "gained"))

    return cell


def difference(metric: str, scale: float, digits: int) -> Cell:
    """Difference to the reference with its interval and verdict; nothing in the reference's own row."""

    def cell(row: JSON) -> str:
        found = row.get("difference", {}).get(metric)
        if row["variant"] == row["reference"] or found is None:
            return ""
        return f"{ranged(found, scale, digits, sign='+')} {found['verdict']}"

    return cell


def ranged(found: JSON, scale: float, digits: int, unit: str = "", sign: str = "") -> str:
    value, low, high = (f"{scale * found[key]:{sign}.{digits}f}" for key in ("value", "low", "high"))
    return f"{value}{unit} [{low}, {high}]"


def removed(row: JSON) -> str:
    """The removed units, with how many searches found them where they differ."""
    names = {run["search_seed"]: " ".join(map(str, run["removed"])) for run in row["runs"]}
    found = Counter(shorten(each, 80, placeholder=" ...") for each in names.values()).most_common()
    return ", ".join(f"{each} ({count}x)" if len(found) > 1 else each for each, count in found)


def cost(stage: str, show: Callable[[JSON], float | None], form: Callable[[float], str]) -> Cell:
    """Median of a cost over the seeds; nothing where there was no such stage, or it has no such cost."""

    def cell(row: JSON) -> str:
        found = [x for run in row["runs"] if stage in run and (x := show(run[stage])) is not None]
        return form(statistics.median(found)) if found else ""

    return cell
