"""Put runs side by side: settings that differ, scores, costs, flips, masks (``python -m src.cli compare``).

A run is the directory of a whole run, with its stages in ``search`` and ``recover``, or that of a single
stage, as a fit leaves it. What a run does not have is shown as "-".
"""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from src.command import Parser, new_file, rich_table, show
from src.errors import ConfigError
from src.evaluate.flips import flips
from src.evaluate.intervals import interval
from src.files import write_json, write_text
from src.mask import git_sha
from src.report import figures
from src.report.figures import tokens_text
from src.report.pages import Page, Picture, html, printable, table_of
from src.report.run import Record, as_written
from src.report.run_files import RunFiles
from src.report.verb import distinct

MANY = 6
"""Most runs that are shown as columns; more are rows."""
Settings = dict[str, dict[str, Any]]
"""Values of settings: of each key, by the name of the run; a run without the key is missing."""


def differences(settings: Mapping[str, Mapping[str, Any]]) -> Settings:
    """Return the settings that are not equal in all runs, with their values.

    Of a part that is of another class, or that a run does not have, only what all runs have is compared.

    Args:
        settings: of each run, by its name: values by key.
    """
    keys = dict.fromkeys(key for own in settings.values() for key in own)
    values = {key: {name: own[key] for name, own in settings.items() if key in own} for key in keys}
    found = {key: own for key, own in values.items() if len(own) < len(settings) or not _equal(own.values())}
    others = tuple(key.removesuffix("class_path") for key in found if key.endswith(".class_path"))
    return {
        key: own
        for key, own in found.items()
        if key.endswith(".class_path") or len(own) == len(settings) or not key.startswith(others)
    }


def _equal(values: Iterable[Any]) -> bool:
    first, *others = values
    return all(other == first for other in others)


def pair(one: RunFiles, other: RunFiles) -> Record:
    """Compare two runs item by item and unit by unit.

    Returns:
        ``runs``, their names; ``removed_by_both`` and ``removed_by_either``, numbers of units, if the masks
        choose among the same units. If both were judged by the same rows: ``lost``, ``gained`` and ``p`` of
        the second against the first (:func:`src.evaluate.flips.flips`); and ``kl`` and ``cut_kl``, the
        second's less the first's, paired by rows (:func:`src.evaluate.intervals.interval`), if both are
        distances from one teacher.
    """
    found: Record = {"runs": [one.name, other.name]}
    masks = [mask for mask in (one.mask, other.mask) if mask is not None]
    if len(masks) == 2 and len({(mask.unit, mask.num_layers, mask.width) for mask in masks}) == 1:
        gone = [set(mask.removed) for mask in masks]
        found |= {"removed_by_both": len(gone[0] & gone[1]), "removed_by_either": len(gone[0] | gone[1])}
    rows = {run.evaluate.get("content") for run in (one, other)}
    if len(rows) == 1 and None not in rows and one.verdicts and other.verdicts:
        found |= flips(other.verdicts, one.verdicts)
    if len(rows) == 1 and None not in rows and _one_teacher(one.evaluate, other.evaluate):
        ours, theirs = one.row_kl, other.row_kl
        for key in [key for key in ours if key in theirs and np.array_equal(ours[key][1], theirs[key][1])]:
            found[key] = interval(theirs[key][:1] - ours[key][:1], ours[key][1])
    return found


def _one_teacher(one: Record, other: Record) -> bool:
    """Return whether two evaluations are beside one teacher: its path and type, and its loss to 0.01 %."""
    teachers = [told.get("teacher") or {} for told in (one, other)]
    named = {
        (teacher.get("path"), told.get("dtype")) for teacher, told in zip(teachers, (one, other), strict=True)
    }
    return len(named) == 1 and math.isclose(*(teacher.get("loss", 0.0) for teacher in teachers), rel_tol=1e-4)


def compare(runs: Sequence[RunFiles]) -> Record:
    """Return the comparison as plain values: figures of each run, settings that differ, and all pairs."""
    return {
        "runs": [run.figures for run in runs],
        "settings": differences({run.name: run.settings for run in runs}),
        "pairs": [pair(*two) for two in combinations(runs, 2)],
    }


def tables(compared: Record) -> list[list[list[str]]]:
    """Return the tables of a comparison: figures, settings, pairs; each a list of rows, the heading first."""
    names = [run["name"] for run in compared["runs"]]
    scores = table_of({"models": compared["runs"]})
    scores = [["", *names], *scores[1:], *_more(compared["runs"])]
    against = {each["runs"][1]: each for each in compared["pairs"] if each["runs"][0] == names[0]}
    for key, label in (("cut_kl", "KL of the cut"), ("kl", "KL")):
        if any(key in each for each in against.values()):
            cells = ("{value:+.4f} [{low:.4f}, {high:.4f}]".format(**against[name][key])
                     if key in against.get(name, {}) else "-" for name in names)  # fmt: skip
            scores.append([f"{label}, less that of {names[0]}", *cells])
    found = [["setting", *names]]
    for key, values in compared["settings"].items():
        found.append([key, *(_text(values[name]) if name in values else "-" for name in names)])
    pairs = [["", "against", "units removed by both / by either", "items lost / gained"]]
    for each in compared["pairs"]:
        units = "{removed_by_both} / {removed_by_either}".format(**each) if "removed_by_both" in each else "-"
        items = "{lost} / {gained}  (p = {p:.2g})".format(**each) if "lost" in each else "-"
        pairs.append([each["runs"][1], each["runs"][0], units, items])
    return [scores, *([found] if len(found) > 1 else []), pairs]


def turned(shown: Sequence[list[list[str]]]) -> list[list[list[str]]]:
    """Return tables with a row for each run: the figures that are not equal in all, then the settings."""
    (names, *figures), *settings, _ = shown
    differ = [row for row in figures if len({*row[1:]}) > 1]
    words = [
        [row[0].replace(".init_args", "").replace(".", " "), *row[1:]] for t in settings for row in t[1:]
    ]
    return [[list(column) for column in zip(names, *rows, strict=True)] for rows in (differ, words) if rows]


def _more(runs: Sequence[Record]) -> Iterator[list[str]]:
    """Yield the rows that a report of one run does not need."""
    for label, key, cell in (
        ("KL of the mask, nats", "mask_kl", "{:.4f}".format),
        ("search, forward tokens", "search_forward_tokens", tokens_text),
        ("removed", "removed", str), ("steps", "steps", "{:,}".format), ("code", "commit", str),
    ):  # fmt: skip
        if any(key in run for run in runs):
            yield [label, *(cell(run[key]) if key in run else "-" for run in runs)]
    held_out = [run.get("validation", {}) for run in runs]
    for name in dict.fromkeys(name for own in held_out for name in own):
        yield [name, *(f"{own[name]:.4f}" if name in own else "-" for own in held_out)]


def _text(value: Any) -> str:
    plain = {True: "true", False: "false", None: "null", "": '""'}
    return (
        plain[value] if value is None or value == "" or isinstance(value, bool) else printable(str(value), "")
    )


def main(argv: list[str]) -> None:
    """Compare runs: print the tables, and write them as JSON or HTML if asked.

    Raises:
        ConfigError: a path is no run, a file of a run is not as the stages write it, or a result cannot be
            written.
    """
    args = _parse(argv)
    runs = []
    for name, path in zip(distinct(args.runs), args.runs, strict=True):
        with as_written(Path(path)):
            runs.append(run := RunFiles.read(name, Path(path)))
            compare([run, run])  # what cannot be compared is told of by the run that has it
    compared = compare(runs)
    origin = {
        "commit": git_sha(),
        "command": printable(shlex.join(["python", "-m", "src.cli", "compare", *argv])),
    }
    shown = tables(compared)
    shown = shown if len(runs) <= MANY else turned(shown)
    for table in shown:
        show(rich_table(table))
    if not compared["settings"]:
        print("No setting differs.")
    if args.json:
        write_json(args.json, compared | origin)
    if args.html:
        strips = [(run.name, figures.svg(figures.mask_strip(run.mask))) for run in runs if run.mask]
        pictures = [Picture(name, f"What {name} removes.", svg) for name, svg in strips]
        title = f"{', '.join(run.name for run in runs)}, side by side"
        write_text(args.html, html(Page(title, shown, [], pictures, [], origin)))


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("compare", "Put runs side by side: settings that differ, scores, costs, flips, masks.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run, or of one stage of it")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the comparison as JSON")
    parser.add_argument("--html", type=new_file, metavar="FILE", help="write the tables and masks as a page")
    args = parser.parse_args(argv)
    if args.json and args.html and Path(args.json).resolve() == Path(args.html).resolve():
        raise ConfigError(f"--json, --html: both are '{args.html}'; accepted: a file of its own for each.")
    if len(args.runs) < 2:
        raise ConfigError(f"compare: one run given, '{args.runs[0]}'; give two or more.")
    return args
