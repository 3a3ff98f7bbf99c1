"""Check all values of a parsed experiment before anything is built or called.

The ranges of this product's constructors are their annotations (:mod:`src.ranges`). Those of Lightning's
trainer are listed here. An optimiser checks its own settings when it is built, so it is built here once,
for a parameter that serves nothing else. No number may be NaN or infinite.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from inspect import isroutine
from pkgutil import resolve_name
from typing import Any

import torch
from jsonargparse import Namespace
from torch.optim import Optimizer

from src.errors import ConfigError
from src.ranges import (
    HUGE,
    MOST,
    SEED,
    Range,
    above_zero,
    from_zero,
    natural,
    needs_value,
    positive,
    ranges_of,
)
from src.training import threads

_UNLIMITED = Range(int, 0, 2**63 - 1, "low", also=(-1,))
_SOME, _ANY = Range(float, 0, MOST, "low"), Range(float, 0, MOST)
TRAINER = {
    "max_steps": _UNLIMITED,
    "max_epochs": _UNLIMITED,
    "min_steps": natural,
    "min_epochs": natural,
    "accumulate_grad_batches": positive,
    "devices": Range(int, 0, MOST, "low", also=(-1,)),
    "num_nodes": positive,
    "gradient_clip_val": from_zero,
    "log_every_n_steps": positive,
    "check_val_every_n_epoch": positive,
    "val_check_interval": _SOME,
    "limit_train_batches": _SOME,
    "limit_predict_batches": _SOME,
    "limit_val_batches": _ANY,
    "limit_test_batches": _ANY,
    "overfit_batches": _ANY,
    "num_sanity_val_steps": Range(int, 0, MOST, also=(-1,)),
    "reload_dataloaders_every_n_epochs": natural,
}
"""Ranges of a trainer's numbers; the trainer itself judges a switch or a word in their place."""
WRITER = {"flush_secs": positive, "max_queue": positive, "purge_step": natural}
"""Ranges of the numbers that a logger passes on, without types, to TensorBoard's writer."""
TEXT = ("filename_suffix",)
"""Keys of the same writer whose values are texts."""
NAMES = ("monitor",)
"""Keys of Lightning's callbacks whose values are texts that may be null, but not empty."""


def check_settings(config: Namespace) -> None:
    """Refuse numbers outside their ranges, and a function where a class is to be built.

    Args:
        config: one verb's parsed arguments.

    Raises:
        ConfigError: names every key at fault.
    """
    wrong = list(_faults("", config))
    wrong += _numbers("trainer.", vars(config.trainer), TRAINER)
    wrong += _numbers("", vars(config), {"seed_everything": Range(int, 0, SEED), "threads": threads.NUMBER})
    if wrong:
        raise ConfigError(". ".join(wrong) + ".")


def _numbers(prefix: str, values: Mapping[str, Any], ranges: Mapping[str, Range]) -> Iterator[str]:
    for key, accepted in ranges.items():
        value = values.get(key)
        if isinstance(value, str) and value.removeprefix("-").isdecimal():
            value = int(value)  # the parser reads --devices as text
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and value not in accepted and not _beyond(value):
            yield f"{prefix}{key}: {value} given; accepted: {accepted}"


def _beyond(value: Any) -> bool:
    """Return whether a value is NaN, infinite or so large that it is as good as that."""
    return isinstance(value, float) and not abs(value) <= HUGE


def _faults(path: str, value: Any) -> Iterator[str]:
    """Yield the faults below one key, in the order of the file."""
    if _beyond(value):
        limit = f"of at most {HUGE} in size" if math.isfinite(value) else "that is finite"
        yield f"{path}: {value} given; accepted: a number {limit}"
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _faults(f"{path}.{number}", part)
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _faults(f"{path}.{key}", part)
    elif isinstance(value, Namespace) and "class_path" in value:
        yield from _component(path, value)
    elif isroutine(value):
        yield f"{path}: the function '{value.__qualname__}' given; accepted: a class_path"
    elif isinstance(value, Namespace):
        for key, part in vars(value).items():
            yield from _faults(f"{path}.{key}".lstrip("."), part)


def _component(path: str, value: Namespace) -> Iterator[str]:
    component, arguments = resolve_name(value.class_path), value.get("init_args") or Namespace()
    optimiser = isinstance(component, type) and issubclass(component, Optimizer)
    if not isinstance(component, type) or (path.endswith(".optimizer") and not optimiser):
        kind = "an optimiser, such as torch.optim.AdamW" if path.endswith(".optimizer") else "a class"
        yield f"{path}: '{value.class_path}' given; accepted: {kind}"
        return
    ranges = ranges_of(component) | ({"lr": above_zero} if optimiser else {})
    below = [
        *_faults(path, arguments),
        *_numbers(f"{path}.", vars(arguments), ranges),
        *_absent(path, component, arguments),
    ]
    for key, untyped in {**arguments.as_dict(), **dict(value.get("dict_kwargs") or {})}.items():
        if key in WRITER and untyped not in WRITER[key] and (untyped, key) != (None, "purge_step"):
            below.append(f"{path}.{key}: {untyped!r} given; accepted: {WRITER[key]}")
        if key in TEXT and not isinstance(untyped, str):
            below.append(f"{path}.{key}: {untyped!r} given; accepted: text")
        if key in NAMES and untyped == "":
            below.append(f"{path}.{key}: '' given; accepted: a name, or null")
    yield from below if below or not optimiser else _optimiser(path, component, vars(arguments))


def _absent(path: str, component: type, arguments: Namespace) -> Iterator[str]:
    """Yield the faults of keys that are null and need a value; the parser lets any key be null."""
    nulls = [key for key, value in vars(arguments).items() if value is None]
    for key in (key for key in nulls if key in needs_value(component)):
        yield f"{path}.{key}: null given; accepted: a value, or leave the key out"


def _optimiser(path: str, component: type[Optimizer], arguments: dict[str, Any]) -> Iterator[str]:
    """Yield the fault that an optimiser finds in its arguments, if it finds one."""
    try:
        component([torch.nn.Parameter(torch.zeros(1))], **arguments)
    except Exception as e:  # each has its own
        yield f"{path}: {component.__name__}: {e}"
