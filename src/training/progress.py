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
from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")

FIRST, EVERY, RARELY = 10.0, 30.0, 600.0
"""Seconds until the first line, and the least and the most between two lines."""
REDRAWN = 0.1
"""Seconds between two states of a bar."""


def on_terminal() -> bool:
    """Return whether a person sees what is printed as it is printed."""
    return sys.stdout.isatty() and sys.stderr.isatty()


def track(items: Iterable[T], about: str, total: int | None = None) -> Iterator[T]:
    """Yield ``items``, and show on the screen of the first rank how many are done.

    A bar disappears with the last item; lines, where there is no terminal, go to the error stream.

    Args:
        items: what is worked through.
        about: name of the task, which the bar or the lines begin with.
        total: number of items; None asks ``items`` for its length.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    if on_terminal() and _first_rank():
        yield from _bar(items, about, total)
        return
    lines = Lines(about)
    for done, item in enumerate(items):
        lines.tell(done, total)
        yield item


def _bar(items: Iterable[T], about: str, total: int | None) -> Iterator[T]:
    """Yield ``items`` under a bar, which stands below that of a run if there is one."""
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()
    with Progress(
        *columns, TimeRemainingColumn(), console=get_console(), transient=True, auto_refresh=False
    ) as bar:
        task, drawn = bar.add_task(about, total=total), time.monotonic()
        for item in items:
            yield item
            bar.advance(task)
            if time.monotonic() > drawn + REDRAWN:  # below another bar nothing else redraws it
                drawn = time.monotonic()
                bar.refresh()


class Lines:
    """Prints on the first rank's error stream how far a long task is: after 10 seconds, then every 30.

    Once more than a minute has passed, the next line comes after half as long again, or after ten minutes.
    A line is printed only from within :meth:`tell`.

    Args:
        about: what the line begins with, such as ``batches``; time counts from here.
        before: how many parts were done earlier, by the run that this one resumes.
    """

    def __init__(self, about: str, before: int = 0) -> None:
        self.about, self.before, self.began = about, before, time.monotonic()
        self.due = self.began + FIRST

    def tell(self, done: int, total: float | None, more: str = "") -> None:
        """Print a line if one is due.

        Args:
            done: how many parts of the task are done, earlier ones among them.
            total: how many there are, by which the time left is told; None if that is not known.
            more: what the line ends with.
        """
        now = time.monotonic()
        if now < self.due or not _first_rank():
            return
        self.due = now + _pause(now - self.began)
        left = ""
        if total is not None and self.before < done <= total < math.inf:
            each = (now - self.began) / (done - self.before)
            left = f" of {total:.0f}, {each * (total - done):.0f} s left"
        print(f"{self.about}: {done}{left}{more}", file=sys.stderr, flush=True)


def _pause(passed: float) -> float:
    """Return the seconds between two lines after so many of the task."""
    return min(max(EVERY, passed / 2), RARELY)


@contextmanager
def waiting(about: str) -> Iterator[None]:
    """Say that the block still runs: on a terminal until it ends, elsewhere by lines with the seconds so far.

    Lines go to the first rank's error stream, after 30 seconds and as often as those of :class:`Lines`.
    """
    if on_terminal() and _first_rank():
        with get_console().status(about):
            yield
        return
    over, began = threading.Event(), time.monotonic()

    def tell() -> None:
        passed = 0.0
        while not over.wait(_pause(passed)):
            passed = time.monotonic() - began
            print(f"{about}: {passed:.0f} s", file=sys.stderr, flush=True)

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
