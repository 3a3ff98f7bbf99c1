"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
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
    """Write ``value`` as indented JSON, as :func:`write_text` does."""
    write_text(path, json.dumps(value, indent=2) + "\n")
