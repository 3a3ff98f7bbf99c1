"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from src.errors import ConfigError


def write_text(path: str | Path, text: str) -> None:
    """Write a file under a temporary name, then rename.

    Raises:
        ConfigError: the directory cannot be written to.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text)
        partial.replace(path)
    except OSError as e:
        raise ConfigError(f"cannot write '{path}': {e.strerror}. Choose another directory.") from e


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, as :func:`write_text` does.

    Raises:
        ConfigError: a number in it is NaN or infinite, which JSON cannot say; names it.
    """
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except ValueError as e:
        where = next(_not_finite(value), str(e))
        raise ConfigError(
            f"cannot write '{path}': {where}, and JSON holds finite numbers only. The model, or what it was "
            f"trained with, is broken."
        ) from e
    write_text(path, text + "\n")


def _not_finite(value: Any, key: str = "") -> Iterator[str]:
    """Where a NaN or an infinity is in a value, as ``key.key is nan``."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{key or 'the value'} is {value}"
    listed = isinstance(value, list | tuple)
    parts = value.items() if isinstance(value, dict) else enumerate(value) if listed else ()
    for name, part in parts:
        yield from _not_finite(part, f"{key}.{name}".lstrip("."))
