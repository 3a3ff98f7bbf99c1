"""State which numbers a setting accepts, once: in the annotation of the constructor that takes it.

``draws: Count = 4`` is an int to Python and to the parser; :func:`checked` refuses what lies outside. The
command line does so for all settings at once, before anything is loaded (:mod:`src.training.settings`), and a
tool's option takes a range as its ``type``. Nothing accepts NaN or an infinity.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, wraps
from inspect import signature
from typing import Annotated, Any, TypeVar, cast, get_args, get_type_hints

from src.errors import ConfigError

Init = TypeVar("Init", bound=Callable[..., None])


@dataclass(frozen=True)
class Range:
    """Describes which numbers are accepted: those from ``low`` to ``high``, and those of ``also``.

    Attributes:
        kind: ``int`` for whole numbers, or ``float``.
        low: the least number.
        high: the largest number.
        open: which ends are themselves excluded: ``low``, ``high``, ``both``, or none (an empty text).
        also: numbers outside that have a meaning of their own, such as -1 for no limit.
    """

    kind: type
    low: float = -math.inf
    high: float = math.inf
    open: str = ""
    also: tuple[int, ...] = ()

    def __str__(self) -> str:
        what = "a whole number" if self.kind is int else "a number"
        above, below = self.open in ("low", "both"), self.open in ("high", "both")
        ends = [f"{'above' if above else 'from'} {self.low:,}"] if self.low > -math.inf else []
        if self.high < math.inf:
            ends.append(f"{'below' if below else 'at most' if above else 'to'} {self.high:,}")
        span = (" and " if self.open else " ").join(ends) or "that is finite"
        return ", or ".join([f"{what} {span}", *map(str, self.also)])

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        if value in self.also:
            return True
        whole = self.kind is float or isinstance(value, int)
        above = value > self.low if self.open in ("low", "both") else value >= self.low
        below = value < self.high if self.open in ("high", "both") else value <= self.high
        return whole and above and below

    def __call__(self, text: str) -> Any:
        """Return the number that an option's text stands for; a range is a ``type`` of argparse.

        Raises:
            ArgumentTypeError: it is none, or outside.
        """
        try:
            value = self.kind(text)
        except ValueError:
            value = None
        if value not in self:
            raise argparse.ArgumentTypeError(f"'{text}' given; accepted: {self}")
        return value


SEED = 2**32 - 1
"""The largest seed that all generators take."""
MOST = 2**31 - 1
"""Largest count of anything but tokens."""

HUGE = 1e30
"""Largest size of a number that is no count; products of larger ones would soon overflow float32."""

positive = Range(int, 0, MOST, open="low")
natural = Range(int, 0, MOST)
share = Range(float, 0, 1)
above_zero = Range(float, 0, HUGE, open="low")
from_zero = Range(float, 0, HUGE)
inside_unit = Range(float, 0, 1, open="both")

Count = Annotated[int, positive]
Natural = Annotated[int, natural]
Seed = Annotated[int, Range(int, 0, SEED)]
Share = Annotated[float, share]
Positive = Annotated[float, above_zero]
NonNegative = Annotated[float, from_zero]
Finite = Annotated[float, Range(float, -HUGE, HUGE)]


def checked(init: Init) -> Init:
    """Decorate a constructor so that it refuses all numbers outside the ranges of its annotations."""
    names = list(signature(init).parameters)

    @wraps(init)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> None:
        values = dict(zip(names[1:], args, strict=False)) | kwargs
        component: type = type(self)
        refuse(faults(values, ranges_of(component)))
        init(self, *args, **kwargs)

    return cast(Init, guarded)


@cache
def _ranges(init: Callable[..., None]) -> dict[str, Range]:
    """Return the range of each annotated parameter of a function."""
    ranges = dict[str, Range]()
    for name, hint in get_type_hints(init, include_extras=True).items():
        for part in (hint, *get_args(hint)):  # a range may stand in a union with None
            for own in getattr(part, "__metadata__", ()):
                if isinstance(own, Range):
                    ranges[name] = own
    return ranges


@cache
def ranges_of(component: type) -> dict[str, Range]:
    """Return the range of each parameter of a class by name, those of its bases' constructors too."""
    own = [vars(base)["__init__"] for base in component.__mro__ if "__init__" in vars(base)]
    guarded = [init.__wrapped__ for init in reversed(own) if hasattr(init, "__wrapped__")]
    return {name: accepted for init in guarded for name, accepted in _ranges(init).items()}


@cache
def needs_value(component: type) -> frozenset[str]:
    """Return the parameters of a class, as far as it is defined in ``src``, that may not be None."""
    own = [base for base in component.__mro__ if base.__module__.startswith("src.")]
    hints = dict[str, Any]()
    for base in reversed(own):
        if "__init__" in vars(base):
            hints |= get_type_hints(vars(base)["__init__"])
    return frozenset(
        key for key, hint in hints.items() if hint is not Any and type(None) not in get_args(hint)
    )


def faults(given: Mapping[str, Any], ranges: Mapping[str, Range], prefix: str = "") -> list[str]:
    """Return a sentence for each number outside its range.

    Args:
        given: values by key; those that are no numbers are not judged.
        ranges: accepted range by key.
        prefix: text before each key, such as ``model.``.
    """
    judged = {key: given[key] for key in ranges if isinstance(given.get(key), int | float)}
    return [
        f"{prefix}{key}: {value} given; accepted: {ranges[key]}"
        for key, value in judged.items()
        if value not in ranges[key]
    ]


def refuse(wrong: list[str]) -> None:
    """Raise all faults in one message; without faults do nothing.

    Raises:
        ConfigError: there is a fault.
    """
    if wrong:
        raise ConfigError(". ".join(wrong) + ".")
