"""Check what a column or a message holds: text that can be encoded, of a size that fits in memory."""

from __future__ import annotations

import re
from typing import Any

from src.data.formats import MAX_DOCUMENT
from src.errors import ConfigError

_HALF = re.compile("[\ud800-\udfff]")


def checked(value: Any, what: str) -> str:
    """Return a value if it is a text that can be encoded and is not too large.

    Args:
        value: what a column or a message holds.
        what: names it in a message of error, such as ``FILE row 3: column 'text'``.

    Raises:
        ConfigError: it is no such text; says what was found.
    """
    if not isinstance(value, str):
        kind = "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
        raise ConfigError(f"{what} holds {kind}; expected text.")
    if len(value) > MAX_DOCUMENT:
        raise ConfigError(f"{what} holds {len(value):,} characters; at most {MAX_DOCUMENT:,} are read.")
    if not value.isascii() and _HALF.search(value):
        raise ConfigError(f"{what} holds half of a surrogate pair, which no UTF-8 text can.")
    return value
