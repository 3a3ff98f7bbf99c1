"""What the pages show: their fenced blocks of commands, each with the marker above it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

PAGES = [Path("README.md"), Path("CONTRIBUTING.md"), *sorted(Path("docs").rglob("*.md"))]
FENCE = re.compile(r"^(?:<!-- (run|not run): (.+?) -->\n)?```(\w*)\n(.*?)^```$", re.S | re.M)


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    kind: str
    """``run``, ``not run``, or nothing where no marker stands above."""
    how: str
    """What runs it, or why nothing does."""
    language: str
    text: str

    @property
    def lines(self) -> list[list[str]]:
        """Its command lines, in words."""
        lines = self.text.replace("\\\n", " ").splitlines() if self.language == "bash" else []
        return [found for line in lines if (found := shlex.split(line, comments=True))]

    @property
    def commands(self) -> list[list[str]]:
        """Arguments of each call of the product, from the verb on."""
        calls = [line for line in self.lines if "src.cli" in line]
        return [[word for word in line[line.index("src.cli") + 1 :] if word != "&"] for line in calls]


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    return [Block(page, *found) for found in FENCE.findall(page.read_text())]


def run_by(test: str, pages: list[Path] = PAGES) -> list[Block]:
    """The blocks whose marker names a test."""
    return [block for page in pages for block in blocks(page) if (block.kind, block.how) == ("run", test)]
