"""Keep libraries' advice and notices off the screen; warnings about the run stay."""

from __future__ import annotations

import logging
import sys
import warnings

from transformers.utils import logging as transformers_logging

ADVICE = ("💡", "GPU available:", "TPU available:", "HPU available:", "Seed set to", "`Trainer.fit` stopped:")
"""Beginnings of messages of Lightning that say nothing about the run."""
NOTICES = (
    r".*does not have many workers.*",  # on the small machines that the demo is made for, they only cost
    r".*treespec, LeafSpec.*",  # between Lightning and torch
    r".*there is no last checkpoint available.*",  # a run that may be resumed begins anew
    r"LightningCLI's args parameter.*",  # the arguments are handed over, so that tests can call it
    r".*Checkpoint directory .* exists and is not empty.*",  # as when a run is resumed
)
"""Warnings that libraries address to their developers, or that warn of what is done on purpose."""


def advice(record: logging.LogRecord) -> bool:
    """Return whether a log record should be shown: it is not one of those in :data:`ADVICE`."""
    return not record.getMessage().lstrip().startswith(ADVICE)


def quieten() -> None:
    """Hide some messages of Lightning (:data:`ADVICE`) and some Python warnings (:data:`NOTICES`).

    Every other warning is shown as one line, without the source line that raised it. Where stderr is no
    terminal, the progress bars of transformers are off. All this holds for the whole process.
    """
    import lightning.pytorch  # makes its handlers, if nothing has yet

    for name in (lightning.pytorch.__name__, "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(advice)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells each matrix product that it rounds
    for notice in NOTICES:
        warnings.filterwarnings("ignore", message=notice)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    if not sys.stderr.isatty():  # a bar that is no terminal's is a heap of its states
        transformers_logging.disable_progress_bar()
