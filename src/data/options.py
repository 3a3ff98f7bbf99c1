"""Check what a user writes under ``data:``, and turn short forms into exact values."""

from __future__ import annotations

import argparse
import math
from typing import Any, get_args

from src.data.columns import Columns
from src.data.formats import Format
from src.data.sources import Source
from src.data.stream import LANES
from src.errors import ConfigError, did_you_mean

Sources = str | list[str | dict[str, Any]]
"""A path; or a mixture, a list of paths and of dicts with the keys of :class:`src.data.sources.Source`.

Not ``Source`` itself: for a dataclass the parser of the command line would try a path as a file of settings,
and so read the whole corpus.
"""

_POWERS = {"K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}


def sources(given: Sources | None, key: str) -> list[Source]:
    """Return the sources that a user gives as a path or a list.

    Args:
        given: what the user gives; None is no source.
        key: the key that it stands under, for messages.

    Raises:
        ConfigError: a source has a wrong or unknown key, or only some have weights.
    """
    listed = [given] if isinstance(given, str) else [] if given is None else given
    parts = [_source({"path": part} if isinstance(part, str) else part, key) for part in listed]
    check_weights(parts, key)
    return parts


def _source(part: dict[str, Any] | Source, key: str) -> Source:
    if isinstance(part, Source):
        return part
    if not isinstance(part, dict):
        raise ConfigError(f"{key}: a part of the mixture is {part!r}; give a path, or its keys.")
    known = Source.__dataclass_fields__
    for name in part:
        if name not in known:
            accepted = ", ".join(known)
            raise ConfigError(
                f"{key}: unknown key '{name}' (accepted: {accepted}).{did_you_mean(name, known)}"
            )
    if "path" not in part:
        raise ConfigError(f"{key}: a part of the mixture names no path: {part}.")
    # What is trained on is the split of that name; what is judged on must be named where there are several.
    source = Source(**{"split": "train", **part} if key == "data.train" else part)
    for name in ("path", "split", "name"):
        if not isinstance(value := getattr(source, name), str) and (name == "path" or value is not None):
            raise ConfigError(f"{key}: '{name}' of a part of the mixture is {value!r}; expected text.")
    if source.rows is not None and (type(source.rows) is not int or source.rows < 1):
        raise ConfigError(
            f"{key}: '{source.path}' has rows {source.rows!r}; accepted: a whole number above 0, or null."
        )
    if not source.path.strip():
        raise ConfigError(f"{key}: a path is empty; name a file, a pattern, a directory or a Hub id.")
    if source.format not in (None, *get_args(Format)):
        accepted = ", ".join(get_args(Format))
        raise ConfigError(f"{key}: '{source.path}' has format '{source.format}'; accepted: {accepted}.")
    return source


def check_weights(sources: list[Source], key: str) -> None:
    """Refuse a mixture in which only some sources have a weight, or one is not positive.

    Raises:
        ConfigError: names the source and the key.
    """
    for source in sources:
        number = isinstance(source.weight, int | float) and 0 < source.weight < math.inf
        if source.weight is not None and not number:
            raise ConfigError(
                f"{key}: '{source.path}' has weight {source.weight}; a weight is a positive "
                "number. To leave a part out, remove it."
            )
    bare = [source.path for source in sources if source.weight is None]
    if bare and len(bare) < len(sources):
        raise ConfigError(f"{key}: '{bare[0]}' has no weight; give one to every part, or to none.")


def token_count(tokens: int | str | None) -> int | None:
    """Return a number of tokens from a number or a text such as 500M; None is no limit.

    Raises:
        ConfigError: it is no positive number.
    """
    try:
        return None if tokens is None else amount(str(tokens))
    except argparse.ArgumentTypeError as e:
        raise ConfigError(f"data.max_tokens: {e}.") from e


def amount(text: str) -> int:
    """Return the count that a text such as 500M stands for: K, M, B, G, T are 1e3, 1e6, 1e9, 1e9, 1e12.

    It serves as the ``type`` of an option.

    Raises:
        ArgumentTypeError: it is no positive number.
    """
    digits = text.strip().upper()
    factor = _POWERS.get(digits[-1:])
    try:
        count = int(float(digits[:-1] if factor else digits) * (factor or 1.0))
    except (ValueError, OverflowError):
        count = 0
    if not 1 <= count < 2**63:
        raise argparse.ArgumentTypeError(
            f"'{text}' given; accepted: a number above 0 such as 2000000 or 500M"
        )
    return count


def check(held_out: float, validation: Sources | None, num_workers: int) -> None:
    """Refuse values that do not go together: a check that the range of a single option cannot make.

    ``held_out`` and ``validation`` exclude each other. ``num_workers`` is 0 or divides
    :data:`src.data.stream.LANES`, because all workers serve the same number of a rank's lanes.

    Raises:
        ConfigError: one of these does not hold; the message names every key at fault.
    """
    workers = [0, *(n for n in range(1, LANES + 1) if LANES % n == 0)]
    faults = []
    if held_out and validation:
        faults.append("data.held_out and data.validation are both set; keep one")
    if num_workers not in workers:
        faults.append(f"data.num_workers is {num_workers}; accepted: {workers}")
    if faults:
        raise ConfigError(". ".join(faults) + ".")


COLUMN_OPTIONS = ("text", "prompt", "answer", "messages", "input", "system", "ignore", "split")
"""Names of the options of :func:`add_columns`."""


def add_columns(
    parser: argparse.ArgumentParser, split: str = "split of a Hub or saved dataset that has several"
) -> None:
    """Add options to a command by which a user says which columns of the rows are read.

    Args:
        parser: parser of the command.
        split: help of ``--split``.
    """
    add = parser.add_argument
    add("--prompt", metavar="COLUMN", help="column of the prompt (default: well-known names)")
    add("--answer", metavar="COLUMN", help="column of the answer, together with --prompt")
    add("--text", metavar="COLUMN", help="column of plain text, instead of prompt and answer")
    add("--messages", metavar="COLUMN", help="column of chats, instead of prompt and answer")
    add("--input", metavar="COLUMN", help="column of what the prompt is about")
    add("--system", metavar="COLUMN", help="column of a system prompt")
    add(
        "--ignore",
        nargs="+",
        action="extend",
        default=[],
        metavar="COLUMN",
        help="columns to leave out that condition answers",
    )
    add("--split", help=split)


def read_columns(args: argparse.Namespace) -> Columns:
    """Return the columns that the options of :func:`add_columns` name."""
    return Columns(
        args.text, args.prompt, args.answer, args.messages, args.input, args.system, ignore=tuple(args.ignore)
    )
