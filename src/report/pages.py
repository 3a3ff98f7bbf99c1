"""Write a report's text: its table and headline, and the Markdown and HTML around the figures."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

from src.benchmark import PHASES, verdict
from src.mask import WIDE
from src.report import tasks
from src.report.figures import tokens_text

Record = dict[str, Any]


@dataclass(frozen=True)
class Picture:
    """Holds a figure as SVG, with its file name and caption."""

    name: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Page:
    """Holds what the Markdown and the HTML page show.

    Attributes:
        title: one sentence on the run.
        tables: tables, each a list of rows of cells, the heading first.
        notes: what a reader of the figures should beware of.
        pictures: the figures.
        answers: a table of prompts, and what each model answers; it may be empty.
        origin: facts on how the figures were made, such as commit and device, by name.
    """

    title: str
    tables: list[list[list[str]]]
    notes: list[str]
    pictures: list[Picture]
    answers: list[list[str]]
    origin: dict[str, Any]


def printable(text: str, also: str = "\n\t") -> str:
    """Return the text with unprintable characters replaced, except those in ``also``."""
    return "".join(c if c.isprintable() or c in also else "\N{REPLACEMENT CHARACTER}" for c in text)


# ---------------------------------------------------------------------- the table and the sentence


def _match(m: Record) -> str:
    kept = f"  ({m['retention']:.1%} kept)" if "retention" in m else ""
    return f"{m['exact_match']:.1%}{_ends(m, 'exact_match', 100, 1)}{kept}"


def _ends(m: Record, figure: str, scale: float, digits: int) -> str:
    """Return a figure's 95 % interval as text; nothing if it has none, or one without width."""
    low, high = m.get(f"{figure}_interval", (0.0, 0.0))
    return f" [{scale * low:.{digits}f}, {scale * high:.{digits}f}]" if low < high else ""


def _nats(figure: str) -> Callable[[Record], str]:
    return lambda m: f"{m[figure]:.4f}{_ends(m, figure, 1, 4)}"


def _speed(phase: str) -> Callable[[Record], str]:
    def cell(m: Record) -> str:
        speed = m[phase]
        beside = f"  ({speed['speedup']:.2f}x, ideal {speed['ideal']:.2f}x)" if speed["ideal"] != 1 else ""
        return f"{speed['tokens_per_s']:,.0f}{beside}"

    return cell


ROWS: tuple[tuple[str, str, Callable[[Record], str]], ...] = (
    ("layers", "layers", lambda m: str(m["layers"])),
    ("parameters", "parameters", lambda m: f"{m['parameters']:,}"),
    ("exact match", "exact_match", _match),
    ("items lost / gained", "flips", lambda m: "{lost} / {gained}  (p = {p:.2g})".format(**m["flips"])),
    ("held-out KL of the cut, nats", "cut_kl", _nats("cut_kl")),
    ("held-out KL, nats", "kl", _nats("kl")),
    ("top-1 agreement", "agreement", lambda m: f"{m['agreement']:.2%}"),
    ("perplexity", "perplexity", lambda m: f"{m['perplexity']:.3f}"),
    ("distinct tokens read", "distinct_tokens", lambda m: tokens_text(m["distinct_tokens"])),
    ("tokens processed", "tokens", lambda m: tokens_text(m["tokens"])),
    ("seconds spent", "seconds", lambda m: f"{m['seconds']:,.0f}"),
    ("prefill, tokens/s", "prefill", _speed("prefill")),
    ("decode, tokens/s", "decode", _speed("decode")),
)
"""Rows of the table: a label, the key of the figure that it shows, and the function that writes a cell."""


def table_of(report: Record) -> list[list[str]]:
    """Return the table of a report: a heading with the models, then a row for each figure that any has."""
    models = report["models"]
    lines = [["", *("cut, no recovery" if m["name"] == "cut" else m["name"] for m in models)]]
    for label, key, cell in ROWS:
        if any(key in model for model in models):
            lines.append([label, *(cell(model) if key in model else "-" for model in models)])
    named = [(task, metric) for m in models for task, own in m.get("tasks", {}).items() for metric in own]
    for task, metric in dict.fromkeys(named):
        scores = (model.get("tasks", {}).get(task, {}).get(metric) for model in models)
        lines.append([f"{task}, {metric}", *map(tasks.cell, scores)])
    return lines


def budgets_of(report: Record) -> list[list[str]]:
    """Return the table of a search for several sizes: a heading, then a row for each size's mask."""
    rows = [["budget", "layers removed", "KL, nats", "mask"]]
    for each in report["budgets"]:
        removed = f"{each['removed']} of {report['num_layers']}"
        rows.append([f"{each['share']:g}", removed, f"{each['kl']:.4f}", each["mask"]])
    return rows


def headline(report: Record) -> str:
    """Return one sentence on the last model of a report: what was removed, kept, gained and spent."""
    student = report["models"][-1]
    gone = f"{report['num_layers'] - report['depth']} of {report['num_layers']} layers"
    parts = [f"{report['removed_layers'] if report['unit'] in WIDE else gone} removed"]
    if "retention" in student:
        parts.append(f"{student['retention']:.1%} of the teacher's exact match kept")
    elif "kl" in student:
        parts.append(f"{student['kl']:.3f} nats per token from the teacher")
    if "decode" in student:
        parts.append("decoding {speedup:.2f}x as fast (ideal {ideal:.2f}x)".format(**student["decode"]))
    training = report["teacher_training_tokens"]
    read = student.get("distinct_tokens", student.get("tokens"))
    if training and read:
        times = f", read {student['tokens'] / read:.1f} times" if student["tokens"] > 1.05 * read else ""
        parts.append(f"for {read / training:.1%} of the teacher's training tokens{times}")
    return ", ".join(parts)


def notes(report: Record) -> list[str]:
    """Return a warning for each measured speed-up that falls short of the ideal or of 1."""
    verdicts = [
        verdict(model["name"], phase, model["batch_size"], model[phase])
        for model in report["models"][1:]
        for phase in PHASES
        if phase in model
    ]
    return [note for note in verdicts if note is not None]


# ---------------------------------------------------------------------- the pages


def markdown(page: Page) -> str:
    """Return the page as Markdown, which refers to the figures as files in ``figures/``."""
    lines = [f"# {page.title}", ""]
    for heading, *rows in page.tables:
        lines += [_markdown_row(heading), "|---" + "|---:" * (len(heading) - 1) + "|"]
        lines += [*map(_markdown_row, rows), ""]
    lines += [f"> {note}\n" for note in page.notes]
    for picture in page.pictures:
        lines += [f"![{picture.caption}](figures/{picture.name}.svg)", "", f"*{picture.caption}*", ""]
    if page.answers:  # as HTML: whatever a model writes, no part of it is Markdown
        lines += ["## Answers", "", _html_table(page.answers), ""]
    lines += ["---", "", "; ".join(f"{key} `{value}`" for key, value in page.origin.items())]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def html(page: Page) -> str:
    """Return the page as HTML that holds its figures and loads nothing from elsewhere."""
    images = [base64.b64encode(picture.svg.encode()).decode() for picture in page.pictures]
    parts = [
        f"<h1>{escape(page.title)}</h1>",
        *map(_html_table, page.tables),
        *(f'<p class="note">{escape(note)}</p>' for note in page.notes),
        *(
            f'<figure><img alt="{escape(picture.caption)}" src="data:image/svg+xml;base64,{image}">'
            f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
            for picture, image in zip(page.pictures, images, strict=True)
        ),
    ]
    if page.answers:
        parts += ["<h2>Answers</h2>", _html_table(page.answers)]
    facts = [f"{key} <code>{escape(str(value))}</code>" for key, value in page.origin.items()]
    return _TEMPLATE.format(title=escape(page.title), body="\n".join(parts), origin=" &middot; ".join(facts))


def _html_table(table: list[list[str]]) -> str:
    cells = ([escape(printable(cell)).replace("\n", "<br>") for cell in row] for row in table)
    head, *body = ("".join(f"<td>{cell}</td>" for cell in row) for row in cells)
    rows = "\n".join(f"<tr>{row}</tr>" for row in body)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table>"


_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1e293b;
       max-width: 960px; margin: 3rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.55rem; line-height: 1.3 }}
h2 {{ font-size: 1.1rem; margin-top: 2.5rem }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; margin: 1.5rem 0 }}
td {{ padding: .42rem .7rem; border-bottom: 1px solid #e2e8f0; text-align: right }}
td:first-child {{ text-align: left; color: #475569 }}
thead td {{ font-weight: 600; border-bottom: 2px solid #94a3b8 }}
tr td:last-child {{ background: #f0fdfa }}
figure {{ margin: 2rem 0 }}
img {{ width: 100% }}
figcaption {{ color: #64748b; font-size: .9rem }}
.note {{ border-left: 4px solid #d97706; background: #fffbeb; padding: .5rem 1rem }}
h2 + table td {{ font-size: .85rem; text-align: left; vertical-align: top; white-space: pre-wrap }}
footer {{ margin-top: 3rem; padding-top: 1rem; border-top: 1px solid #e2e8f0;
         color: #64748b; font-size: .85rem }}
</style>
</head>
<body>
{body}
<footer>{origin}</footer>
</body>
</html>
"""
