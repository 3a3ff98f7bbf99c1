"""Read the options of ``python -m src.cli shorten``, and hand columns on to the commands that it runs."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import yaml

from src.command import Parser, named
from src.data.options import COLUMN_OPTIONS, Sources, add_columns, amount, read_columns
from src.errors import ConfigError, did_you_mean
from src.mask import Unit
from src.ranges import SEED, Range, inside_unit, positive
from src.shorten.text import SHARE

POLICIES = Path(__file__).parents[2] / "configs" / "policy"


def _yaml(text: str, otherwise: Any = None) -> Any:
    """Return what YAML reads in a text, as the parser of ``fit`` does; ``otherwise`` if it is no YAML."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # ValueError: a date that there is not, such as 2026-13-45
        return otherwise


def _goal(text: str) -> str:
    """Return the text of a target, as ``type`` of argparse.

    Raises:
        ArgumentTypeError: it is no mapping.
    """
    if not isinstance(_yaml(text), dict):
        raise argparse.ArgumentTypeError(f"'{text}' given; accepted: such as '{{speedup: 1.3}}'")
    return text


def place(text: str) -> str:
    """Return a name that is not empty; what lies below the working directory has one, whoever writes it.

    A run is known by its command: the absolute path of a file must not make a finished stage begin anew.

    Raises:
        ArgumentTypeError: it is empty.
    """
    if not os.path.isabs(named(text)) and not os.path.exists(text):
        return text
    inside = os.path.relpath(text)
    short = os.path.normpath(text) if os.path.isabs(text) and inside.startswith(os.pardir) else inside
    same = os.path.realpath(short) == os.path.realpath(text)  # not where a link stands before a ".."
    return short if same and _read_as_written(short) else text


def _read_as_written(name: str) -> bool:
    """Return whether a command line and YAML take a name for what it is, and not for an option or null."""
    return not name.startswith("-") and bool(_yaml(name) == name)


def parse(argv: list[str]) -> argparse.Namespace:
    """Return what a user asks for.

    Raises:
        ConfigError: an option has a wrong value, or columns contradict each other.
    """
    parser = Parser("shorten", "Shorten a model with one command: search, recover, export, judge, report.")
    add = parser.add_argument
    add("--model", required=True, type=place, metavar="NAME", help="Hub id or directory")
    add(
        "--train",
        required=True,
        type=place,
        metavar="TEXT",
        help="file, pattern, directory, URL or Hub id to learn from",
    )
    add(
        "--held-out",
        type=place,
        metavar="TEXT",
        help=f"rows to judge by (default: {SHARE:.0%}% of the text, kept apart)",
    )
    _add_amounts(parser)
    add("--unit", default="layer", choices=get_args(Unit), help="what is removed (docs/units.md)")
    add("--method", metavar="NAME", help="an overlay of configs/policy/ (default: Gumbel-TopK)")
    add(
        "--tokens",
        type=amount,
        metavar="N",
        help="tokens that the recovery processes, such as 5M (default: by the text)",
    )
    add("--out", type=place, metavar="DIR", help="the new model (default: <run>/recovered)")
    add("--run", type=place, metavar="DIR", help="where all else goes (default: logs/shorten/<model>)")
    add("--seed", type=Range(int, 0, SEED), default=0, help="of masks and the order of rows (default: 0)")
    add("--search", default="", metavar="OPTIONS", help="further options of the search's fit, quoted")
    add("--recover", default="", metavar="OPTIONS", help="further options of the recovery's fit, quoted")
    told = "print settings and commands, run nothing; a new run gets its settings and held-out rows"
    add("--dry-run", action="store_true", help=told)
    add_columns(parser, "split of --held-out, if that is a Hub or saved dataset that has several")
    args = parser.parse_args(argv)
    known = sorted(path.stem for path in POLICIES.glob("*.yaml"))
    if args.method is not None and args.method not in known:
        hint = did_you_mean(args.method, known)
        raise ConfigError(f"--method: '{args.method}' given; accepted: {', '.join(known)}.{hint}")
    if args.split and not args.held_out:
        raise ConfigError(
            f"--split: '{args.split}' is one of the rows to judge by; name them with --held-out."
        )
    read_columns(args)
    _check_names(args)
    return args


def _add_amounts(parser: Parser) -> None:
    """Add the options that say how much is removed, of which one is given."""
    add = parser.add_mutually_exclusive_group().add_argument
    told = "share of the layers, or other units, to remove (default: 0.25)"
    add("--ratio", type=inside_unit, default=0.25, metavar="X", help=told)
    add("--remove", type=positive, metavar="N", help="layers, or other units, to remove, instead of a share")
    goal = "what the model should reach, instead of a share: '{speedup: 1.3}', parameters or memory_gib"
    add("--target", type=_goal, metavar="GOAL", help=goal)


def _check_names(args: argparse.Namespace) -> None:
    """Refuse a name of a column that the parser of ``fit``, which reads YAML, takes for none.

    Raises:
        ConfigError: names the option.
    """
    for key, name in _columns(args):
        if _yaml(name, otherwise=name) is None:
            raise ConfigError(
                f"--{key}: {name!r} given, which fit would read as null; accepted: a column of another name."
            )


def _columns(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Yield each name that the options of columns give, with its option."""
    for key in COLUMN_OPTIONS:
        given = getattr(args, key)
        yield from ((key, name) for name in ([given] if isinstance(given, str) else given or ()))


def held_out(args: argparse.Namespace) -> Sources | None:
    """Return the rows to judge by, of the split that the user names; None if the user names none."""
    return [{"path": args.held_out, "split": args.split}] if args.split else args.held_out


def columns_of_fit(args: argparse.Namespace) -> list[str]:
    """Return the option of ``fit`` that names the columns which the user names.

    It is one mapping: a value of its own would be read as YAML, and ``[x]`` as a list.
    """
    found = {key: value for key in COLUMN_OPTIONS if key != "split" and (value := getattr(args, key))}
    return [f"--data.init_args.columns={json.dumps(found, ensure_ascii=False)}"] if found else []


def columns_of_evaluate(args: argparse.Namespace) -> list[str]:
    """Return the options of ``evaluate`` that name the columns which the user names, and the split."""
    return [f"--{key}={name}" for key, name in _columns(args)]
