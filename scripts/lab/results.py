"""Results files: what was measured, and the command, commit and versions that it comes from."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Collection
from importlib import metadata
from pathlib import Path
from typing import Any

from src.files import write_json
from src.mask import git_sha

JSON = dict[str, Any]
TEACHER = "assets/arithmetic-teacher"
LIBRARIES = ("torch", "transformers", "lightning", "bitsandbytes", "deepspeed", "peft")


def origin(commit: str | None = None) -> JSON:
    """Where figures come from: the running command, the commit of the code, versions of the libraries.

    Args:
        commit: of a copy without its repository.
    """
    installed = {found.name: found.version for found in metadata.distributions()}
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "commit": commit or git_sha(),
        "versions": {name: installed[name] for name in LIBRARIES if name in installed},
    }


def read(path: str | Path) -> JSON:
    """A results file, by its name under ``results/`` or its path; empty if it was never made."""
    path = Path("results", f"{path}.json") if isinstance(path, str) else path
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, figures: JSON) -> None:
    """Write a results file whole, with its origin."""
    write_json(path, {**origin(), **figures})


def add(path: Path, section: str, figures: JSON) -> None:
    """Put a section into a results file, with an origin of its own; the other sections stay."""
    write_json(path, {**read(path), section: {**origin(), **figures}})


def options(
    about: str | None, argv: list[str] | None = None, parts: Collection[str] = (), **given: tuple[Any, str]
) -> argparse.Namespace:
    """The options of a script, each from its default and a word on it; the default's type is the option's.

    A list takes several values, of the type of its first; ``False`` is a switch.

    Args:
        about: the script's docstring.
        argv: the command line; None is the process's own.
        parts: what the script can be asked to do alone, by words without dashes; all of it by default.
        given: default and help of each option.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    if parts:
        parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(parts)} (default: all)")
    for name, (default, told) in given.items():
        keys: JSON = {"default": default, "help": f"{told} (default: {default})"}
        if default is False:
            keys = {"action": "store_true", "help": told}
        elif isinstance(default, list):
            keys |= {"nargs": "*", "type": type(default[0])}
        elif default is not None:
            keys["type"] = Path if isinstance(default, Path) else type(default)
        parser.add_argument(f"--{name.replace('_', '-')}", **keys)
    args = parser.parse_args(argv)
    if parts:
        args.parts = args.parts or list(parts)
        if unknown := set(args.parts) - set(parts):
            parser.error(f"{', '.join(unknown)}: no such part; accepted: {', '.join(parts)}")
    return args
