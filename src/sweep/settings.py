"""Read the file of a sweep, and refuse what no trial could run, before the first one runs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

from src.errors import ConfigError, did_you_mean
from src.ranges import SEED, Range
from src.sweep.keys import Key, text
from src.training.parsing import parsed
from src.training.settings_file import read_settings

DIRECTIONS = ("minimize", "maximize")
_COUNT, _SEED = Range(int, 1), Range(int, 0, SEED)


@dataclass(frozen=True)
class Sweep:
    """Holds what is swept.

    Attributes:
        config: the experiment and overlays of every trial.
        keys: what is searched.
        metric: name of the figure that a trial is judged by (:func:`src.sweep.trials.figures`).
        direction: ``minimize`` or ``maximize``.
        trials: number of trials.
        out: directory of the study and of the trials.
        seed: seed of the values that are tried.
        set: settings of every trial, by key.
        more: further options of every trial, from the command line.
    """

    config: tuple[str, ...]
    keys: tuple[Key, ...]
    metric: str
    direction: str
    trials: int
    out: str
    seed: int = 0
    set: Mapping[str, Any] | None = None
    more: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: str, more: Sequence[str]) -> Sweep:
        """Read the file of a sweep, and parse every choice and both ends of every range as ``fit`` would.

        Raises:
            ConfigError: the file cannot be read, a field is missing or wrong, or ``fit`` refuses a value.
        """
        try:
            given = read_settings(path)
        except FileNotFoundError as e:
            raise ConfigError(f"--config: there is no file '{path}'.") from e
        try:
            sweep = cls(**_checked(given), more=tuple(more))
            sweep.check()
        except ConfigError as e:
            raise ConfigError(f"--config: '{path}': {e}") from e
        return sweep

    def check(self) -> None:
        """Parse commands in which every value that a key is :attr:`~Key.tried` at comes up.

        Raises:
            ConfigError: ``fit`` refuses one.
        """
        for turn in range(max(len(key.tried) for key in self.keys)):
            values = {key.name: key.tried[turn % len(key.tried)] for key in self.keys}
            parsed(self.argv(values, self.place(0))[1:])

    def place(self, number: int) -> Path:
        """Return the directory of a trial; its name counts from 1, the number from 0."""
        return Path(self.out) / f"trial_{number + 1}"

    def argv(self, values: Mapping[str, str], place: Path | None = None) -> list[str]:
        """Return the command of a trial.

        Args:
            values: value of each key.
            place: the trial's directory; None leaves it to the config.
        """
        chosen = [values["config"]] if values.get("config", "null") != "null" else []
        settings = {key: text(value) for key, value in (self.set or {}).items()}
        settings |= {key: value for key, value in values.items() if key != "config"}
        if place is not None:
            where = {"save_dir": str(place.parents[1]), "name": place.parent.name, "version": place.name}
            settings |= {f"trainer.logger.init_args.{key}": value for key, value in where.items()}
        files = chain.from_iterable(("--config", file) for file in (*self.config, *chosen))
        return ["fit", *files, *self.more, *(f"--{key}={value}" for key, value in settings.items())]

    def command(self, values: Mapping[str, str]) -> str:
        """Return the command of a trial as a user types it, into the directory that the config names."""
        return shlex.join(["python", "-m", "src.cli", *self.argv(values)])

    @property
    def identity(self) -> dict[str, Any]:
        """What the trials follow from, as plain values; the number of trials may grow."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        plain["keys"] = {key.name: [*key.choices] or [key.low, key.high, key.log] for key in self.keys}
        found: dict[str, Any] = json.loads(
            json.dumps({k: v for k, v in plain.items() if k not in ("trials", "out")})
        )
        return found


def _checked(given: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a file as :class:`Sweep` takes them.

    Raises:
        ConfigError: one is missing, unknown or wrong; names it, and what is accepted.
    """
    known = [field.name for field in fields(Sweep) if field.name != "more"]
    for name in given:
        if name not in known:
            raise ConfigError(f"there is no field '{name}'.{did_you_mean(str(name), known)}")
    if missing := [name for name in known if name not in given and name not in ("seed", "set")]:
        raise ConfigError(f"{', '.join(missing)}: not given. A sweep needs {', '.join(known[:6])}.")
    files = given["config"] if isinstance(given["config"], list) else [given["config"]]
    accepted = {
        "config": (
            "a YAML file of fit, or a list of them",
            files and all(isinstance(file, str) for file in files),
        ),
        "keys": (
            "keys of fit with their ranges or choices",
            isinstance(given["keys"], dict) and given["keys"],
        ),
        "metric": ("the name of a figure", isinstance(given["metric"], str)),
        "direction": (" or ".join(DIRECTIONS), given["direction"] in DIRECTIONS),
        "trials": (str(_COUNT), given["trials"] in _COUNT),
        "out": ("a directory", isinstance(given["out"], str) and given["out"]),
        "seed": (str(_SEED), given.get("seed", 0) in _SEED),
        "set": ("settings of fit by key", isinstance(given.get("set") or {}, dict)),
    }
    for name, (what, holds) in accepted.items():
        if not holds:
            raise ConfigError(f"{name}: {text(given[name])} given; accepted: {what}.")
    keys = tuple(Key.read(str(name), value) for name, value in given["keys"].items())
    if twice := {key.name for key in keys} & {*(given.get("set") or {})}:
        raise ConfigError(
            f"set: {', '.join(sorted(twice))} given under keys too; one of them says what it is."
        )
    return given | {"config": tuple(files), "keys": keys}
