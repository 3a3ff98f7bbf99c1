"""Scripts stay small, and what they share works: options, results, pages, calls in fresh processes."""

from __future__ import annotations

import ast
import io
import os
import re
import time
import tokenize
from pathlib import Path

import pytest

from scripts.lab.jobs import Failure, isolated
from scripts.lab.pages import fill, table
from scripts.lab.results import add, options, read, write
from scripts.readme_results import MISSING, figure
from src.errors import ConfigError

MOST = 3_300
"""Lines of code of all scripts: no blanks, comments or docstrings."""
LAYOUT = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)


def code_lines(text: str) -> int:
    """Lines that hold code."""
    told = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    held = {line for t in tokens if t.type not in LAYOUT for line in range(t.start[0], t.end[0] + 1)}
    return len(held - told)


def test_scripts_stay_small() -> None:
    assert code_lines('"""Doc."""\n\n# comment\nx = (\n    1,  # one\n)\n') == 3
    assert sum(code_lines(path.read_text()) for path in Path("scripts").rglob("*.py")) <= MOST


def test_options_take_their_types_from_their_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    given = {
        "rows": (3, "rows"),
        "seeds": ([0, 1], "seeds"),
        "fresh": (False, "anew"),
        "out": (Path("a"), "results"),
    }
    plain = options("about", [], parts=("read", "write"), **given)
    assert (plain.parts, plain.rows, plain.seeds, plain.fresh, plain.out) == (
        ["read", "write"],
        3,
        [0, 1],
        False,
        Path("a"),
    )
    asked = options(
        "about",
        ["write", "--rows", "4", "--seeds", "2", "--fresh", "--out", "b"],
        parts=("read", "write"),
        **given,
    )
    assert (asked.parts, asked.rows, asked.seeds, asked.fresh, asked.out) == (
        ["write"],
        4,
        [2],
        True,
        Path("b"),
    )
    with pytest.raises(SystemExit):
        options("about", ["wirte"], parts=("read", "write"))
    assert "wirte: no such part; accepted: read, write" in capsys.readouterr().err


def test_a_section_keeps_the_others_and_says_where_it_comes_from(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    assert read(path) == {}
    write(path, {"a": 1})
    add(path, "part", {"b": 2})
    found = read(path)
    assert found["a"] == 1
    assert found["part"]["b"] == 2
    assert {"command", "commit", "versions"} <= found["part"].keys() & found.keys()
    assert "torch" in found["versions"]


def test_a_page_is_filled_between_its_markers_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a -->\nold\n<!-- /a -->\nbetween\n<!-- b -->\nkept\n<!-- /b -->\n")
    fill(page, table("x | y", [(1, "p|q")]), "a")
    assert page.read_text() == (
        "before\n<!-- a -->\n| x | y |\n|---|---|\n| 1 | p/q |\n<!-- /a -->\n"
        "between\n<!-- b -->\nkept\n<!-- /b -->\n"
    )
    with pytest.raises(ConfigError, match="<!-- c -->"):
        fill(page, [], "c")
    assert "kept" in page.read_text()


def test_a_figure_is_the_mean_over_the_rows_that_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    measured = ("a", 1.0), ("a", 4.0), ("b", 9.0)
    rows = [{"by": by, "ratio": 0.25, "runs": [{"kl": kl}]} for by, kl in measured]
    write(Path("results/x.json"), {"rows": rows})

    def shown(asked: str) -> str:
        return re.sub(r"\{(.+?)\}", figure, asked)

    assert shown("KL {x by=a,ratio=0.25 runs.0.kl .2f} of {x by=b runs.0.kl .0f}") == "KL 2.50 of 9"
    assert shown("{x by=c runs.0.kl .2f}, {y by=a kl .2f}") == f"{MISSING}, {MISSING}"


def environment(name: str) -> str | None:
    return os.environ.get(name)


def faulty() -> None:
    raise ValueError("two\nlines")


def test_a_call_in_a_fresh_process_returns_raises_or_is_stopped(tmp_path: Path) -> None:
    assert isolated(environment, "E3_FRESH", env={"E3_FRESH": "yes"}) == "yes"
    assert "E3_FRESH" not in os.environ
    with pytest.raises(Failure, match=r"^ValueError: two lines$"):
        isolated(faulty, log=tmp_path / "log")
    assert "Traceback" in (tmp_path / "log").read_text()
    with pytest.raises(Failure, match="the process died"):
        isolated(os._exit, 3)
    with pytest.raises(Failure, match=r"stopped after 0\.5 s"):
        isolated(time.sleep, 60, limit=0.5)
