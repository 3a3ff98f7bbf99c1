"""Send an export to the Hugging Face Hub: card, mask, weights, tokenizer, and the report of its run if given.

``export --push USER/NAME`` does it after the proof; ``python -m src.export.push DIRECTORY USER/NAME`` does it
later, as when scores have been put into the card. It is one commit, so the Hub has all of it or nothing.
"""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import cast

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from src.errors import ConfigError, first_line

_FAULTS = (cast(type[Exception], HfHubHTTPError.__bases__[0]), OSError)
"""What a call of the Hub may raise: errors of the library by which it speaks HTTP, no token, no network."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a push, but its name."""
    parser.add_argument(
        "--public", action="store_true", help="let everybody see a repository that --push makes"
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="report.html of the run, pushed along")


def wanted(args: argparse.Namespace) -> bool:
    """Return whether the option ``push`` is given; those of :func:`add_options` mean nothing without it.

    Raises:
        ConfigError: one of them is given alone; names it.
    """
    alone = [f"--{key}" for key in ("public", "report") if getattr(args, key)]
    if args.push is None and alone:
        raise ConfigError(f"{', '.join(alone)}: given without --push USER/NAME, and nothing is sent then.")
    return args.push is not None


def check(name: str, replace: bool, report: Path | None) -> None:
    """Refuse a push that would fail, before any work is done.

    Args:
        name: USER/NAME of the model on the Hub.
        replace: whether a model of this name may be replaced.
        report: a file that goes along, or None.

    Raises:
        ConfigError: the name is none, or it is taken; nobody is logged in; the Hub cannot be reached; or
            there is no such report.
    """
    if not re.fullmatch("[^/]+/[^/]+", name):
        raise ConfigError(f"--push: '{name}' given; accepted: USER/NAME.")
    if report is not None and not report.is_file():
        raise ConfigError(f"--report: there is no file '{report}'.")
    try:
        HfApi().whoami()
        taken = HfApi().repo_exists(name)
    except HFValidationError as e:
        raise ConfigError(f"--push: '{name}' given; {first_line(e)}") from e
    except _FAULTS as e:
        raise ConfigError(
            f"--push: the Hub does not let this machine in: {first_line(e)} Log in with `hf auth login`, or "
            f"set HF_TOKEN."
        ) from e
    if taken and not replace:
        raise ConfigError(f"--push: '{name}' exists on the Hub. Give another name, or --force to add to it.")


def push(directory: Path, name: str, public: bool = False, report: Path | None = None) -> None:
    """Send an export, and print where it is.

    Args:
        directory: the export.
        name: USER/NAME of the model on the Hub, which is made unless it exists.
        public: let everybody see it, if it is made now.
        report: ``report.html`` of its run, or None.

    Raises:
        ConfigError: the Hub has refused it; the export stays, and nothing of it is on the Hub.
    """
    files = {
        str(file.relative_to(directory)): file for file in sorted(directory.rglob("*")) if file.is_file()
    }
    if report is not None:
        files["report.html"] = report
    try:
        HfApi().create_repo(name, private=not public, exist_ok=True)
        added = [CommitOperationAdd(inside, file) for inside, file in files.items()]
        done = HfApi().create_commit(name, added, commit_message="The model, its card, mask and proof")
    except _FAULTS as e:
        more = [*(["--public"] if public else []), *(["--report", str(report)] if report else [])]
        again = shlex.join(["python", "-m", "src.export.push", str(directory), name, "--force", *more])
        raise ConfigError(
            f"--push: the Hub has not taken '{name}': {first_line(e)} '{directory}' is whole; send it "
            f"with: {again}"
        ) from e
    print(f"pushed: {done.repo_url}, {'public' if public else 'private'} if it is new")


def main(argv: list[str] | None = None) -> None:
    """Send an export that is there already."""
    parser = argparse.ArgumentParser(prog="python -m src.export.push", description=main.__doc__)
    parser.add_argument("directory", type=Path, help="an exported model")
    parser.add_argument("name", metavar="USER/NAME", help="its name on the Hub")
    add_options(parser)
    parser.add_argument("--force", action="store_true", help="add to a model that exists")
    args = parser.parse_args(argv)
    if not (args.directory / "mask.json").is_file():
        raise ConfigError(f"'{args.directory}' is no export: it holds no mask.json.")
    check(args.name, args.force, args.report)
    push(args.directory, args.name, args.public, args.report)


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
