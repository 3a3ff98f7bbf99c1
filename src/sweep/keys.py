"""What a key of a sweep may be: one of some choices, or a number between two ends."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from src.errors import ConfigError
from src.ranges import Range

if TYPE_CHECKING:
    from optuna.trial import Trial

_NUMBER = Range(float)


@dataclass(frozen=True)
class Key:
    """Holds what a key of ``fit`` may be: one of some choices, or a number between two ends.

    Attributes:
        name: the key, such as ``model.init_args.draws``; ``config`` chooses among overlays.
        choices: the values, as the command line takes them; empty for a range.
        low, high: the ends of the range, both included; whole numbers give whole numbers.
        log: whether numbers are drawn evenly in their logarithm.
    """

    name: str
    choices: tuple[str, ...] = ()
    low: float = 0
    high: float = 0
    log: bool = False

    @classmethod
    def read(cls, name: str, given: Any) -> Key:
        """Read what the file says of a key: a list of choices, or ``{low: ..., high: ..., log: ...}``.

        Raises:
            ConfigError: it is neither, or the range is empty.
        """
        if isinstance(given, list) and given:
            return cls(name, tuple(map(text, given)))
        if isinstance(given, dict) and {"low", "high"} <= given.keys() <= {"low", "high", "log"}:
            key = cls(name, (), **given)
            numbers = key.low in _NUMBER and key.high in _NUMBER and isinstance(key.log, bool)
            if numbers and key.low < key.high and (key.low > 0 or not key.log):
                return key
        raise ConfigError(
            f"keys: {name}: {text(given)} given; accepted: a list of choices, or {{low: L, high: H}} with "
            f"numbers L < H; with log: true L is above 0."
        )

    @property
    def tried(self) -> tuple[str, ...]:
        """The values that are parsed before the first trial: all choices, or both ends."""
        return self.choices or (repr(self.low), repr(self.high))

    def draw(self, trial: Trial) -> str:
        """Return the value of a trial, as the command line takes it."""
        if self.choices:
            return str(trial.suggest_categorical(self.name, self.choices))
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        if whole:
            return repr(trial.suggest_int(self.name, int(self.low), int(self.high), log=self.log))
        return repr(trial.suggest_float(self.name, self.low, self.high, log=self.log))


def text(value: Any) -> str:
    """Return a value as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)
