"""What the texts tell a user to install exists, and is installed with the pins."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

PROJECT = tomllib.loads(Path("pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
TEXTS = [
    Path(name)
    for name in ("README.md", "CONTRIBUTING.md", "Makefile", *map(str, sorted(Path("docs").rglob("*.md"))))
] + [p for top in ("src", "scripts", "configs") for p in sorted(Path(top).rglob("*")) if p.is_file()]
TEXTS = [p for p in TEXTS if p.suffix in (".md", ".py", ".yaml", "")]


def squeezed(path: Path) -> str:
    """The text with adjacent string literals and comment lines joined, so that a command is in one piece."""
    return re.sub(r'"?\s*\n\s*(?:#\s*)?f?"?', " ", path.read_text()).replace("  ", " ")


@pytest.mark.parametrize("path", TEXTS, ids=str)
def test_every_extra_that_is_named_exists(path: Path) -> None:
    named = re.findall(r"(?:\.|e3pruner)\[([a-z,]+)\]'", squeezed(path))
    assert {extra for names in named for extra in names.split(",")} <= EXTRAS.keys()


def test_the_extras_are_named_somewhere() -> None:
    """Guards the pattern above: it finds what there is."""
    text = "".join(map(squeezed, TEXTS))
    assert set(re.findall(r"\.\[([a-z]+)\]'", text)) == EXTRAS.keys()


def test_every_requirement_is_pinned_within_its_range() -> None:
    from packaging.requirements import Requirement

    lines = [line for line in Path("constraints.txt").read_text().splitlines() if "==" in line]
    pins = {name.replace("_", "-").lower(): pin for name, pin in (line.split("==") for line in lines)}
    for listed in (PROJECT["dependencies"], *EXTRAS.values()):
        for requirement in map(Requirement, listed):
            name = requirement.name.replace("_", "-").lower()
            if not name.startswith("types-"):
                assert pins[name] in requirement.specifier, requirement


def test_no_link_is_part_of_the_project() -> None:
    """One to a virtual environment, say, would lead nowhere on another machine."""
    listed = subprocess.run(["git", "ls-files", "--stage"], capture_output=True, text=True)
    assert [line for line in listed.stdout.splitlines() if line.startswith("120000")] == []
    assert "\tMakefile" in listed.stdout or listed.returncode, "there is a repository, or none"
