"""Keep libraries' advice and notices off the screen; warnings about the run stay."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils.tqdm import enable_progress_bars
from transformers.utils import logging as transformers_logging

ADVICE = ("💡", "GPU available:", "TPU available:", "HPU available:", "Seed set to", "`Trainer.fit` stopped:",
          "`Trainer(", "Restoring states from")  # fmt: skip
"""Beginnings of messages of Lightning that say nothing about the run."""
NOTICES = (
    r".*does not have many workers.*",  # on the small machines that the demo is made for, they only cost
    r".*treespec, LeafSpec.*",  # between Lightning and torch
    r".*there is no last checkpoint available.*",  # a run that may be resumed begins anew
    r"LightningCLI's args parameter.*",  # the arguments are handed over, so that tests can call it
    r".*Checkpoint directory .* exists and is not empty.*",  # as when a run is resumed
)
"""Warnings that libraries address to their developers, or that warn of what is done on purpose."""


class Screen(logging.Handler):
    """Writes records to the error stream of the moment, as a progress bar may have taken its place."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def advice(record: logging.LogRecord) -> bool:
    """Return whether a log record should be shown: it is not one of those in :data:`ADVICE`."""
    return not record.getMessage().lstrip().startswith(ADVICE)


def quieten() -> None:
    """Hide some messages of Lightning (:data:`ADVICE`) and some Python warnings (:data:`NOTICES`).

    Every other warning is shown as one line, without the source line that raised it. The bars of transformers
    are off, and on a terminal those of downloads are on. All this holds for the whole process.
    """
    import lightning.pytorch  # makes its handlers, if nothing has yet

    screen = Screen()
    screen.addFilter(advice)
    for name in (lightning.pytorch.__name__, "lightning.fabric"):
        logging.getLogger(name).handlers = [screen]
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells each matrix product that it rounds
    for notice in NOTICES:
        warnings.filterwarnings("ignore", message=notice)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    transformers_logging.disable_progress_bar()
    if sys.stderr.isatty():  # elsewhere a bar is a heap of its states
        enable_progress_bars()


@contextmanager
def silent(*names: str) -> Iterator[None]:
    """Let the loggers of these names print errors only, in the block."""
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
