"""The results of the GPU parts as plain tables, until they are published; nothing is typed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scripts.lab.pages import table
from src.files import write_text

HEAD = """# On a GPU

What only a GPU can show, measured by `bash scripts/gpu_checks.sh`, part by part, from
[results/gpu.json](../results/gpu.json). A pair that cannot work, or broke, stands here with its message.
"""


def write(results: dict[str, dict[str, Any]], out: Path) -> None:
    """Write the whole page: what each part says of itself, and its rows."""
    lines = [HEAD]
    for name, section in results.items():
        rows = section.get("rows", [])
        about = {key: value for key, value in section.items() if key not in ("rows", "versions")}
        about |= section["versions"]
        lines += [f"## {name}", "", "; ".join(f"{key}: {text(value)}" for key, value in about.items()), ""]
        keys = list(dict.fromkeys(key for row in rows for key in row))
        lines += [*table(" | ".join(keys), ([text(row.get(key)) for key in keys] for row in rows)), ""]
    write_text(out, "\n".join(lines) + "\n")


def text(value: Any) -> str:
    """A value in few characters."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "**no**", None: "-"}[value]
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
