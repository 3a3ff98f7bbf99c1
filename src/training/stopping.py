"""End a run on SIGTERM or SIGINT with a message, and leave nothing half-written.

A signal ends a command at once and removes its temporary files. While a run trains or writes a cache it takes
effect after the present batch, when everything is saved (:class:`src.callbacks.StopOnSignal`). The exit
status is 128 plus the signal's number, so that ``fit ... && export ...`` does not go on. A second signal
kills.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import Popen
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT)
STATUSES = tuple(128 + number for number in SIGNALS)
AGAIN = 1.0
"""Seconds within which a second signal counts as the first: a terminal and a launcher may both deliver it."""


class Stopped(SystemExit):
    """Ends a run after a signal; it is a ``SystemExit``, which Lightning and other libraries do not swallow.

    Args:
        number: number of the signal.
        where: at which step or batch the run ended and how to resume it; None if nothing can be resumed.
    """

    def __init__(self, number: int, where: str | None = None) -> None:
        super().__init__(128 + number)
        self.number, self.where = number, where

    def __str__(self) -> str:
        return f"{self.where or 'stopped'} ({signal.Signals(self.number).name})"


ranks: list[Popen[bytes]] = []
"""Processes that this one started as further ranks of its run."""


class _Signal:
    """The signal that this process received, if any."""

    number: int | None = None
    since = 0.0
    patient = False
    """Whether a signal waits for the end of the batch."""


def received() -> int | None:
    """Return the number of the signal that this process received, or None."""
    return _Signal.number


def receive(number: int) -> None:
    """Treat the signal that another rank received as received by this process too."""
    if _Signal.number is None:
        _Signal.number, _Signal.since = number, time.monotonic()


def patient(wait: bool) -> None:
    """Let signals take effect at the end of the batch (``wait``), or at once again.

    Raises:
        Stopped: ``wait`` is false, and a signal is waiting.
    """
    _Signal.patient = wait
    if not wait and _Signal.number is not None:
        raise Stopped(_Signal.number)


def unheeded() -> None:
    """Let SIGINT end this process without a traceback, as SIGTERM does, outside of :func:`heeded`."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def heeded() -> Iterator[None]:
    """Turn SIGTERM and SIGINT into :class:`Stopped` in the block; does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def heed(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a worker that was forked: its owner ends it
            if number == signal.SIGTERM:
                _default(number)
            return
        if _Signal.number is not None:
            if time.monotonic() - _Signal.since > AGAIN:
                _default(number)
            return
        receive(number)
        if not _Signal.patient:
            raise Stopped(number)
        name = signal.Signals(number).name  # not printed: a handler may interrupt a print
        os.write(2, f"\n{name}: the run stops after this step; a second signal kills it.\n".encode())

    _Signal.number, _Signal.patient = None, False
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    ours = {n: handler for n, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}
    try:
        for number in ours:
            signal.signal(number, heed)
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
        _Signal.number, _Signal.patient = None, False


def end(stopped: Stopped) -> NoReturn:
    """End this process after a signal: pass it on to the ranks that it started, print where it stopped, exit.

    Only the first rank prints. The exit status is that of ``stopped``, 128 plus the signal's number.
    """
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(stopped.number)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(stopped, file=sys.stderr)
    raise SystemExit(stopped.code)


def _default(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
