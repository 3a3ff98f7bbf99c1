"""Show how far a long task is: by a bar on a terminal, by a line now and then anywhere else."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
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
        about: name of the task, which the bar or the lines begin with.
        total: number of items; None asks ``items`` for its length.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    if sys.stderr.isatty() and _first_rank():
        yield from tqdm(items, about, total, leave=False, file=sys.stderr)
        return
    lines = Lines(about)
    for done, item in enumerate(items):
        lines.tell(done, total)
        yield item


class Lines:
    """Prints on the first rank's error stream how far a long task is: after 10 seconds, then every 30.

    A line is printed only from within :meth:`tell`.

    Args:
        about: what the line begins with, such as ``batches``; time counts from here.
    """

    def __init__(self, about: str) -> None:
        self.about, self.began = about, time.monotonic()
        self.due = self.began + FIRST

    def tell(self, done: int, total: float | None, more: str = "") -> None:
        """Print a line if one is due.

        Args:
            done: how many parts of the task are done.
            total: how many there are, by which the time left is told; None if that is not known.
            more: what the line ends with.
        """
        now = time.monotonic()
        if now < self.due or not _first_rank():
            return
        self.due = now + EVERY
        left = ""
        if total is not None and 0 < done <= total < math.inf:
            left = f" of {total:.0f}, {(now - self.began) / done * (total - done):.0f} s left"
        print(f"{self.about}: {done}{left}{more}", file=sys.stderr, flush=True)


@contextmanager
def waiting(about: str) -> Iterator[None]:
    """Print ``about`` and the block's seconds so far every 30 seconds, on the first rank's error stream."""
    over, began = threading.Event(), time.monotonic()

    def tell() -> None:
        while not over.wait(EVERY):
            print(f"{about}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    if _first_rank():
        thread.start()
    try:
        yield
    finally:
        over.set()
        if thread.is_alive():
            thread.join()


def _first_rank() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0
