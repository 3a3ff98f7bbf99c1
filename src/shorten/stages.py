"""Run the stages of a run, each a command that runs again only when what it depends on has changed.

What was done is written to ``stages.json``: for each stage a digest of its command, of the content of what it
reads, and of the stages before it. An interrupted stage resumes; one whose digest has changed starts anew.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from src.errors import ConfigError
from src.files import read_json, write_json
from src.training import stopping

DONE, BEGUN = "done", "begun"


@dataclass(frozen=True)
class Stage:
    """Describes a stage of the run: one command of ``src.cli``.

    Attributes:
        name: name of the stage.
        argv: arguments of the command.
        product: the file that the command writes last.
        after: names of the stages whose products it reads.
        facts: fingerprints of the model and the texts that it reads.
        folder: where an interrupted command leaves what it resumes from; None if it cannot resume.
    """

    name: str
    argv: tuple[str, ...]
    product: Path
    after: tuple[str, ...] = ()
    facts: tuple[str | None, ...] = ()
    folder: Path | None = None

    @property
    def command(self) -> str:
        """The command as a user types it."""
        return shlex.join(["python", "-m", "src.cli", *self.argv])


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
        ConfigError: a folder that a stage would write to exists, and this command has not made it.
        SystemExit: a stage has failed; its status is that of the stage.
        Stopped: a signal has ended the run; the stage has received it and ended first.
    """
    done: dict[str, list[str]] = read_json(log) if log.exists() else {}
    for stage, digest in zip(stages, digests(stages).values(), strict=True):
        if done.get(stage.name) == [DONE, digest] and stage.product.exists():
            print(f"{stage.name}: done already, {stage.product}")
            continue
        if stage.folder is not None and done.get(stage.name) not in ([BEGUN, digest], [DONE, digest]):
            if stage.name not in done and stage.folder.exists():
                raise ConfigError(
                    f"--run: '{stage.folder}' is there already, and not from this command. Name another "
                    f"directory, or move it away."
                )
            shutil.rmtree(stage.folder, ignore_errors=True)
        write_json(log, done := {**done, stage.name: [BEGUN, digest]})
        print(f"\n{stage.name}: {stage.command}", flush=True)
        if status := _status(stage):
            print(f"{stage.name} has failed; the same command goes on here.", file=sys.stderr)
            raise SystemExit(status)
        write_json(log, done := {**done, stage.name: [DONE, digest]})


def _status(stage: Stage) -> int:
    """Run a stage and return its exit status; a signal to this process is passed on to the stage."""
    child = subprocess.Popen([sys.executable, "-m", "src.cli", *stage.argv])
    try:
        return child.wait()
    except stopping.Stopped as stop:
        child.send_signal(stop.number)
        child.wait()
        raise stopping.Stopped(stop.number, f"stopped in {stage.name}; the same command goes on") from stop
