"""The house: files that are read at one sitting, functions on one screen, imports in one direction."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from statistics import median

import pytest

SOURCES = sorted(Path("src").rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in SOURCES}

STOREYS = [
    ("errors", "files", "ranges", "mask"),
    ("units", "models", "data", "losses", "training", "cache", "optim"),
    ("policies", "routing"),
    ("search", "recover", "pretrain", "teachers", "callbacks", "repair", "prompts", "linear_patch"),
    ("command", "export", "grow", "evaluate", "plan", "report", "benchmark", "generate", "schema", "vision"),
    ("shorten", "sweep"),
    ("cli",),
]
"""From the ground up: a module imports from its own storey and from those below (DESIGN.md, section 6)."""
HIGHER = {
    "repair.verb": 4,
    "routing.search": 3,
    "data.preview": 4,
    "training.arguments": 4,
    "training.parsing": 4,
    "training.running": 4,
    "training.trainer": 3,
    "training.interleaved": 3,
    "training.weighed": 3,
}
"""Modules that live in a package of a lower storey: the verb of a package, and what builds all parts."""


def name_of(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): tree for path, tree in TREES.items()}


def imported(name: str) -> set[str]:
    """The modules of ``src`` that a module imports: at the top, in functions, and under ``TYPE_CHECKING``.

    To import a module is to run the packages that it lies in.
    """
    found = set[str]()
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    packages = {".".join(module.split(".")[:depth]) for module in found for depth in (2, 3)}
    around = {name, ".".join(name.split(".")[:-1]), "src"}
    return {module for module in found | packages if module in MODULES} - around


def storey(module: str) -> int:
    local = module.removeprefix("src.")
    if local in HIGHER:
        return HIGHER[local]
    return next(floor for floor, names in enumerate(STOREYS) if local.split(".")[0] in names)


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path}:{node.lineno} {node.name}", node


def test_tests_and_scripts_are_read_at_one_sitting_too() -> None:
    files = [path for folder in ("tests", "scripts") for path in Path(folder).rglob("*.py")]
    long = {str(path): count for path in files if (count := len(path.read_text().splitlines())) > 300}
    assert files
    assert not long


def test_every_module_has_its_storey() -> None:
    for module in MODULES.keys() - {"src"}:
        assert storey(module) >= 0, module


def test_imports_point_down() -> None:
    up = [
        f"{module} imports {other}"
        for module in MODULES.keys() - {"src"}
        for other in imported(module)
        if storey(other) > storey(module)
    ]
    assert not up, "\n".join(sorted(up))


def test_there_is_no_circle_of_imports() -> None:
    try:
        list(TopologicalSorter({module: imported(module) for module in MODULES}).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_the_listing_is_the_pipeline() -> None:
    listed = sorted(path.name for path in Path("src").glob("*.py"))
    assert len(listed) <= 14, listed


def test_files_are_short() -> None:
    lines = {path: len(path.read_text().splitlines()) for path in SOURCES}
    assert not {str(path): count for path, count in lines.items() if count > 300}
    assert median(lines.values()) <= 110


def test_functions_fit_a_screen() -> None:
    long = {
        where: length
        for where, node in functions()
        if (length := (node.end_lineno or 0) - node.lineno + 1) > 60
    }
    assert not long


def test_constructors_take_few_settings() -> None:
    """Those that a class passes on to its base are the base's."""
    many = {
        where: count
        for where, node in functions()
        if node.name == "__init__" and (count := len(node.args.args) - 1 + len(node.args.kwonlyargs)) > 12
    }
    assert not many
