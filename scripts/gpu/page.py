"""Tables from the results of the GPU parts: ``python -m scripts.gpu.page [results/gpu.json docs/gpu.md]``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from scripts.gpu.catalogue import PARTS
from scripts.gpu.tables import (
    Section,
    headline,
    laws,
    loss,
    planner,
    search_step,
    speed,
    stages,
    table,
)
from src.files import write_text

HEAD = """# On a GPU

What only a GPU can show, measured by `bash scripts/gpu_checks.sh`, part by part. This page is filled by
`python -m scripts.gpu.page` from [results/gpu.json](../results/gpu.json); nothing is typed by hand. A
pair that cannot work, or broke, stands here with its message.
"""


TABLES: dict[str, tuple[str, Callable[[dict[str, Section]], list[str]]]] = {
    "laws": ("Exactness in bf16", laws),
    "search_step": ("A search step against the naive one", search_step),
    "loss": ("The loss, chunked and whole", loss),
    "speed": ("Prefill and decode of the shortened model", speed),
    "stages": ("Search, cache and recovery", stages),
    "planner": ("Measured memory against the plan", planner),
    "headline": ("A deep teacher shortened", headline),
}


def page(results: dict[str, Section]) -> str:
    """The whole page."""
    lines = [HEAD]
    for group, (title, make) in TABLES.items():
        found = {name: section for name, section in results.items() if name.split("/")[0] == group}
        good = {
            name: section for name, section in found.items() if "error" not in section or "rows" in section
        }
        lines += [f"## {title}", "", *(make(good) if good else ["Not measured yet."]), ""]
        lines += [f"`{name}` ended early: {s['error']}\n" for name, s in found.items() if "error" in s]
    lines += ["## Where the figures come from", ""]
    head = "part | commit | device | torch | driver | libraries"
    lines += table(head, (origin(p.name, results[p.name]) for p in PARTS if p.name in results))
    return "\n".join(lines) + "\n"


def origin(name: str, section: Section) -> tuple[object, ...]:
    versions = ", ".join(f"{library} {version}" for library, version in section["versions"].items())
    keys = ("commit", "device", "torch", "driver")
    return (f"`{name}`", *(section[key] or "-" for key in keys), versions)


def main(results: Path, out: Path) -> None:
    """Write the page and print it."""
    if not results.exists():
        print(f"no figures in {results} yet")
        return
    text = page(json.loads(results.read_text()))
    write_text(out, text)
    print(text)


if __name__ == "__main__":
    given = [Path(word) for word in sys.argv[1:]]
    main(*(given or [Path("results/gpu.json"), Path("docs/gpu.md")]))
