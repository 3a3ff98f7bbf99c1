"""Define the one exception that a user is meant to read, and what helps to word it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """Reports a fault in what the user asked for: what was wrong, what was found, what to change.

    The command line prints it as one short message and exits with status 2.
    """


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the candidate nearest to ``word``, or an empty string."""
    near = difflib.get_close_matches(word, list(candidates), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error, or its class where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
