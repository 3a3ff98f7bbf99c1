"""Cases that only ``make test-full`` runs, because a shorter one beside them holds the same law."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """Return a case of a parametrised test that is slow."""
    return pytest.param(*values, marks=pytest.mark.slow)
