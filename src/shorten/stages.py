"""Run the stages of a run, each a command that runs again only when what it depends on has changed.

What was done is written to ``stages.json``: for each stage a digest of its command, of the content of what it
reads, and of the stages before it. An interrupted stage resumes; one whose digest has changed starts anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.errors import ConfigError
from src.files import read_json, write_json
from src.training import stopping, watchdog

DONE, BEGUN = "done", "begun"


@dataclass(frozen=True)
class Stage:
    """Describes a stage of the run: one command of ``src.cli``.

    Attributes:
        name: name of the stage.
        argv: arguments of the command.
        place: the directory or the file that the command makes.
        last: the file in the directory that the command writes last.
        after: names of the stages whose products it reads.
        facts: fingerprints of the model and the texts that it reads.
        resumes: whether it resumes from what an interrupted command has left.
    """

    name: str
    argv: tuple[str, ...]
    place: Path
    last: str = ""
    after: tuple[str, ...] = ()
    facts: tuple[str | None, ...] = ()
    resumes: bool = False

    @property
    def product(self) -> Path:
        """The file that shows that the stage is done."""
        return self.place / self.last

    @property
    def command(self) -> str:
        """The command as a user types it."""
        return shlex.join(["python", "-m", "src.cli", *self.argv])

    def run(self) -> int:
        """Run the command and return its status."""
        return finish(self.argv, self.name)


def digests(stages: Sequence[Stage]) -> dict[str, str]:
    """Return the digest of each stage, by name; a stage with the same digest has the same product."""
    found: dict[str, str] = {}
    for stage in stages:
        about = [stage.argv, stage.facts, [found[name] for name in stage.after]]
        found[stage.name] = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]
    return found


def work_through(stages: Sequence[Stage], log: Path) -> None:
    """Run the stages that are not done; each command's output goes to the screen.

    Args:
        stages: the stages, in order.
        log: the file ``stages.json`` of the run, which says what is done.

    Raises:
        ConfigError: a file or folder that a stage would write exists, and this command has not made it. No
            stage has run then.
        SystemExit: a stage has failed; its status is that of the stage.
        Stopped: a signal has ended the run; the stage has ended first.
    """
    done = earlier(log, list)
    for stage in stages:
        if stage.place.exists() and done.get(stage.name, [])[2:] != [str(stage.place)]:
            raise foreign(stage.place)
    for stage, digest in zip(stages, digests(stages).values(), strict=True):
        was, place = done.get(stage.name, [])[:2], str(stage.place)
        if was == [DONE, digest] and stage.product.exists():
            print(f"{stage.name}: done already, {stage.product}")
            continue
        if stage.resumes and was not in ([BEGUN, digest], [DONE, digest]):
            shutil.rmtree(stage.place, ignore_errors=True)
        write_json(log, done := {**done, stage.name: [BEGUN, digest, place]})
        print(f"\n{stage.name}: {stage.command}", flush=True)
        if status := stage.run():
            print(f"{stage.name} has failed; the same command goes on here.", file=sys.stderr)
            raise SystemExit(status)
        write_json(log, done := {**done, stage.name: [DONE, digest, place]})


def earlier(path: Path, *kinds: type) -> dict[str, Any]:
    """Read what an earlier call of this command wrote; empty if there was none.

    Args:
        path: a file of JSON.
        kinds: types of its values.

    Raises:
        ConfigError: the file holds something else.
    """
    try:
        found = read_json(path) if path.exists() else {}
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(value, kinds) for value in found.values()):
        raise foreign(path)
    return found


def foreign(path: Path) -> ConfigError:
    """Return the refusal to write over what this command did not make."""
    return ConfigError(
        f"--run, --out: '{path}' is there already, and not from this command. Name another directory, or "
        f"move it away."
    )


def finish(argv: Sequence[str], name: str, log: Path | None = None) -> int:
    """Run a command of ``src.cli`` in a process of its own and return its status.

    A signal to this process ends the command first. It is told by SIGTERM whatever the signal was: SIGINT
    would be a traceback while it starts. If this process is killed, the command ends by itself soon after.

    Args:
        argv: arguments of the command.
        name: what it is, for the message of a stop.
        log: file for what it prints; None is the screen.

    Raises:
        Stopped: a signal has ended this process.
    """
    stopping.patient(True)  # until there is a child that can be told
    with nullcontext() if log is None else open(log, "w") as said:
        watched = {**os.environ, watchdog.PARENT: str(os.getpid())}
        command = [sys.executable, "-m", "src.cli", *argv]
        child = subprocess.Popen(command, env=watched, stdout=said, stderr=said)
    try:
        stopping.patient(False)
        status = child.wait()
        return status if status >= 0 else 128 - status
    except stopping.Stopped as stop:
        child.terminate()
        child.wait()
        raise stopping.Stopped(stop.number, f"stopped in {name}; the same command goes on") from stop
