"""What the pages of a report hold, read back."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any


class Cells(HTMLParser):
    """The texts of all table cells, with their line breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "br":
            self.cells[-1] += "\n"
            return
        self.inside = tag == "td"
        self.cells += [""] * self.inside

    def handle_endtag(self, tag: str) -> None:
        self.inside &= tag != "td"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.cells[-1] += data
