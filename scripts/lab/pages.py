"""Markdown pages whose tables come from results files; what stands between two markers is never typed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from scripts.lab.results import JSON
from src.errors import ConfigError
from src.files import write_text


def table(head: str, rows: Iterable[Iterable[object]], right: bool = False) -> list[str]:
    """Lines of a Markdown table.

    Args:
        head: names of the columns, separated by ``|``.
        rows: cells, as text; a ``|`` within one becomes ``/``.
        right: whether all columns but the first are figures, set to the right.
    """
    names = [name.strip() for name in head.split("|")]
    rule = "|---" + ("|---:" if right else "|---") * (len(names) - 1) + "|"
    first, *cells = ["| " + " | ".join(map(clean, row)) + " |" for row in (names, *rows)]
    return [first, rule, *cells]


def clean(cell: object) -> str:
    """A cell as text that ends no cell."""
    return str(cell).replace("|", "/")


def fill(page: Path, lines: Iterable[str], name: str = "results") -> None:
    """Put lines between ``<!-- name -->`` and ``<!-- /name -->`` of a page; one that is not there is begun.

    Raises:
        ConfigError: the page has no such place.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    text = page.read_text() if page.exists() else f"# {page.stem}\n\n{begin}\n{end}\n"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ConfigError(f"{page}: has not one '{begin}' and one '{end}', between which figures go.")
    head, tail = text.split(begin)[0], text.split(end)[1]
    write_text(page, "\n".join([head + begin, *lines, end + tail]))


def made(section: JSON) -> str:
    """Which command at which commit made a section."""
    return f"`{section['command']}`, commit {section['commit']}."
