"""One story per script, each run as ``python -m scripts.<name>``."""

from __future__ import annotations

import shlex
import sys

from src.mask import git_sha


def origin(script: str) -> dict[str, str | None]:
    """Where a results file comes from: the command that made it, and the commit of the code."""
    return {"command": shlex.join(["python", "-m", f"scripts.{script}", *sys.argv[1:]]), "commit": git_sha()}
