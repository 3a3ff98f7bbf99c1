"""Say how far a long step is: a bar on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

T = TypeVar("T")

FIRST, EVERY = 10.0, 30.0
"""Seconds until the first line, and between two lines."""


def track(items: Iterable[T], about: str, total: int | None = None) -> Iterator[T]:
    """Yield ``items``, and show on the error stream of the first rank how many are done.

    Args:
        items: what is worked through.
        about: names the step.
        total: number of items; None takes it from items that know it.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    if getattr(rank_zero_only, "rank", 0) != 0:
        yield from items
    elif sys.stderr.isatty():
        yield from tqdm(items, about, total, leave=False, file=sys.stderr)
    else:
        yield from _lines(items, about, total)


def _lines(items: Iterable[T], about: str, total: int | None) -> Iterator[T]:
    """Yield ``items``; a step that takes long says so, and how long the rest will take."""
    began = time.monotonic()
    due = began + FIRST
    for done, item in enumerate(items):
        if (now := time.monotonic()) >= due:
            due = now + EVERY
            left = (
                f" of {total}, {(now - began) / done * (total - done):.0f} s left" if total and done else ""
            )
            print(f"{about}: {done}{left}", file=sys.stderr, flush=True)
        yield item
