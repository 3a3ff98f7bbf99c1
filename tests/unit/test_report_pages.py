"""The pages of a report say each figure once, in a cell of its own, whatever the texts hold."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.report.pages import (
    ROWS,
    Page,
    Picture,
    budgets_of,
    headline,
    html,
    markdown,
    printable,
    table_of,
)
from src.report.verb import distinct
from tests.pages import Cells

SPEED = {"tokens_per_s": 1234.5, "speedup": 1.25, "ideal": 1.3}
FULL: dict[str, Any] = {
    "name": "recovered", "layers": 12, "parameters": 1_600_000, "exact_match": 0.98,
    "exact_match_interval": [0.97, 0.99], "retention": 0.981, "flips": {"lost": 3, "gained": 1, "p": 0.625},
    "cut_kl": 1.25, "kl": 0.0217, "kl_interval": [0.02, 0.023], "agreement": 0.9912, "perplexity": 1.5,
    "distinct_tokens": 51_000, "tokens": 408_000, "seconds": 61.4, "prefill": SPEED, "decode": SPEED,
}  # fmt: skip
CELLS = {
    "layers": "12", "parameters": "1,600,000", "exact match": "98.0% [97.0, 99.0]  (98.1% kept)",
    "items lost / gained": "3 / 1  (p = 0.62)", "held-out KL, nats": "0.0217 [0.0200, 0.0230]",
    "held-out KL of the cut, nats": "1.2500",
    "top-1 agreement": "99.12%", "perplexity": "1.500", "distinct tokens read": "51 k",
    "tokens processed": "408 k", "seconds spent": "61", "prefill, tokens/s": "1,234  (1.25x, ideal 1.30x)",
    "decode, tokens/s": "1,234  (1.25x, ideal 1.30x)",
}  # fmt: skip
ODD = "a | b & <c> \"d\" 'e' `f` *g*"


def report(*models: dict[str, Any], **more: Any) -> dict[str, Any]:
    whole = {"num_layers": 16, "depth": 12, "unit": "layer", "removed_layers": [1, 2, 3, 4]}
    return {"models": list(models), "teacher_training_tokens": 10_200_000, "budgets": [], **whole, **more}


def test_a_model_with_every_figure_has_every_cell() -> None:
    heading, *rows = table_of(report({"name": "teacher"}, FULL))
    assert heading == ["", "teacher", "recovered"]
    assert {row[0]: row[2] for row in rows} == CELLS
    assert all(row[1] == "-" for row in rows)


@pytest.mark.parametrize(("label", "key"), [(label, key) for label, key, _ in ROWS])
def test_a_row_is_there_if_and_only_if_a_model_has_its_figure(label: str, key: str) -> None:
    alone = {"name": "other", key: FULL[key]}
    rows = table_of(report({"name": "teacher"}, alone))[1:]
    assert [row[0] for row in rows] == [label]
    without = table_of(report({"name": "teacher"}, {k: v for k, v in FULL.items() if k != key}))
    assert label not in [row[0] for row in without]


def test_an_interval_without_width_and_a_speed_of_the_baseline_are_told_plainly() -> None:
    plain = {"name": "t", "kl": 0.0, "kl_interval": [0.0, 0.0], "decode": {**SPEED, "ideal": 1}}
    rows = dict(row for row in table_of(report(plain))[1:])
    assert rows == {"held-out KL, nats": "0.0000", "decode, tokens/s": "1,234"}


def test_tasks_of_any_model_have_a_row_each() -> None:
    one = {"name": "a", "tasks": {"piqa": {"acc": {"score": 0.75}}}}
    other = {"name": "b", "tasks": {"piqa": {"acc": {"score": 0.6, "ratio": 0.8}, "f1": {"score": 2 / 3}}}}
    rows = table_of(report(one, other))[1:]
    assert rows == [["piqa, acc", "0.75", "0.6  (0.8x)"], ["piqa, f1", "-", "0.6667"]]


def test_a_task_tells_its_difference_from_the_teacher_with_what_is_lost_and_gained() -> None:
    found = {"score": 0.5, "ratio": 0.625, "correct": "01" * 20}
    found["flips"] = {"lost": 8, "gained": 2, "p": 0.11}
    ((_, cell),) = table_of(report({"name": "b", "tasks": {"piqa": {"acc": found}}}))[1:]
    score, change, low, high, rest = re.fullmatch(
        r"(.*)  \(0.625x, (\S+) \[(\S+), (\S+)\], (.*)\)", cell
    ).groups()  # type: ignore[union-attr]
    assert (score, change, rest) == ("0.5", "-0.150", "8 / 2, p = 0.11")
    assert -0.35 < float(low) < -0.25 < 0 < float(high) < 0.05


@pytest.mark.parametrize(
    ("student", "said"),
    [
        (FULL, "4 of 16 layers removed, 98.1% of the teacher's exact match kept, decoding 1.25x as fast "
               "(ideal 1.30x), for 0.5% of the teacher's training tokens, read 8.0 times"),
        ({"name": "s", "kl": 0.5}, "4 of 16 layers removed, 0.500 nats per token from the teacher"),
        ({"name": "s", "tokens": 5_100_000},
         "4 of 16 layers removed, for 50.0% of the teacher's training tokens"),
        ({"name": "s"}, "4 of 16 layers removed"),
    ],
)  # fmt: skip
def test_the_headline_says_what_is_known(student: dict[str, Any], said: str) -> None:
    assert headline(report(student)) == said
    wide = {"unit": "channel", "removed_layers": "12 of 48 channels of each layer"}
    assert headline(report(student, **wide)).startswith("12 of 48 channels of each layer removed")
    assert "training" not in headline(report(student, teacher_training_tokens=None))


def test_budgets_have_a_row_each() -> None:
    curve = [{"share": 0.125, "removed": 2, "kl": 0.01234, "mask": "mask-0.125.json"}]
    assert budgets_of(report(FULL, budgets=curve))[1:] == [["0.125", "2 of 16", "0.0123", "mask-0.125.json"]]


class Read(Cells):
    """The texts of cells, with their line breaks, all texts, and everything that would be loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded, self.texts = list[str](), list[str]()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        super().handle_starttag(tag, attrs)
        self.loaded += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        super().handle_data(data)
        self.texts.append(data)


def page(table: list[list[str]], answers: list[list[str]] | None = None) -> Page:
    pictures = [Picture("layers", ODD, "<svg/>")]
    return Page(ODD, [table], [ODD], pictures, answers or [], {"command": ODD})


@settings(max_examples=40)
@given(st.lists(st.text(st.sampled_from("ab |&<>\"'`"), max_size=9), min_size=3, max_size=3))
def test_cells_come_back_from_both_pages_whatever_they_hold(row: list[str]) -> None:
    table = [["", ODD, "plain"], row]
    read = Read()
    read.feed(html(page(table)))
    assert read.cells == [cell for line in table for cell in line]
    assert read.texts.count(ODD) == 6, "title twice, a cell, note, caption and origin, as text"
    assert all(source.startswith("data:image/svg+xml;base64,") for source in read.loaded)
    lines = [line for line in markdown(page(table)).splitlines() if line.startswith("|")]
    assert len(lines) == 3
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in (lines[0], lines[2])]
    assert [[cell.strip().replace("\\|", "|") for cell in line] for line in cells] == [
        [cell.strip() for cell in line] for line in table
    ]


@settings(max_examples=40)
@given(st.lists(st.text(st.sampled_from("ab |&<>\"'`*_#\n"), max_size=12), min_size=2, max_size=2))
def test_answers_come_back_from_both_pages_as_they_were_written(row: list[str]) -> None:
    """In Markdown they stand in one HTML block: such a block ends at the first blank line."""
    answers = [["prompt", "recovered"], row, ["<b>", "\n\n| a |\n# b"]]
    whole, marked = Read(), Read()
    whole.feed(html(page([["", "a"]], answers)))
    text = markdown(page([["", "a"]], answers))
    block = text[text.index("<table>") : text.index("</table>")]
    marked.feed(block)
    cells = [cell for line in answers for cell in line]
    assert whole.cells == ["", "a", *cells]
    assert marked.cells == cells
    assert "\n\n" not in block
    assert "![" + ODD + "](figures/layers.svg)" in text


def test_unprintable_characters_are_shown_and_not_obeyed() -> None:
    assert printable("a\x1b[31mb\x00\u202ec\n\td") == "a\ufffd[31mb\ufffd\ufffdc\n\td"
    assert printable("a\nb", "") == "a\ufffdb"


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.sampled_from(["a", "b", "teacher"]), min_size=1, max_size=3), max_size=6),
    st.sampled_from(["", "/"]),
)
def test_names_are_unique_and_end_their_paths(parts: list[list[str]], root: str) -> None:
    paths = [root + "/".join(path) for path in parts]
    names = distinct(paths)
    assert len({*names, "teacher"}) == len(names) + 1
    for path, name in zip(paths, names, strict=True):
        assert path.endswith(name) or name.startswith(path)
        shorter = name.partition("/")[2]
        if shorter and not name.endswith(")"):  # one part less would not do
            ends = [f"/{other}".endswith(f"/{shorter}") for other in [*paths, "teacher"]]
            assert sum(ends) > 1
