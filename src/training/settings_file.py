"""Check YAML files of settings before Lightning's parser reads them; each fault is one line."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from src.errors import ConfigError

_BYTES, _NODES = 4 << 20, 100_000
"""Most bytes of a file of settings, and most values, those that an alias repeats included."""


def check_settings_files(argv: Sequence[str]) -> None:
    """Check every YAML file that a command line names, after ``--config`` or any other key.

    Raises:
        ConfigError: see :func:`read_settings`; or an overlay comes before the experiment that it changes.
    """
    overlay = None
    for key, path in _named(argv):
        if not os.path.exists(path):  # what is missing is the parser's to tell, which looks elsewhere too
            continue
        changes = not is_experiment(read_settings(path, key))
        if key == "--config" and changes:
            overlay = overlay or path
        elif key == "--config" and overlay is not None:
            raise ConfigError(
                f"--config: the overlay '{overlay}' comes before the experiment '{path}', which undoes it. "
                f"Give the experiment first: --config {path} --config {overlay}"
            )


def is_experiment(settings: Mapping[str, Any]) -> bool:
    """Return whether settings name classes of a model and of data, as an experiment does.

    An overlay may replace one of the two.
    """
    parts = (settings.get(key) for key in ("model", "data"))
    return all(isinstance(part, str) or "class_path" in (part or {}) for part in parts)


def _named(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    before = ""
    for word in argv:
        key, equals, value = word.partition("=")
        key, value = (key, value) if equals and key.startswith("--") else (before, word)
        if key == "--config" or (key.startswith("--") and value.endswith((".yaml", ".yml"))):
            yield key, value
        before = word


def read_settings(path: str, key: str = "--config") -> dict[str, Any]:
    """Return the settings in a YAML file.

    Args:
        path: the file.
        key: the option that names it.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: it cannot be read, is no YAML of plain values in UTF-8, or holds no mapping; says where.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ConfigError(f"{key}: '{path}' is a directory, a pipe or a device; give a YAML file.")
        with open(path, "rb") as stream:
            content = stream.read(_BYTES + 1)
        if len(content) > _BYTES:
            raise ConfigError(f"{key}: '{path}' has more than {_BYTES >> 20} MiB; settings are smaller.")
        settings = yaml.safe_load(content.decode("utf-8-sig"))
        _count(settings, key, path, (), [0])
    except (ConfigError, FileNotFoundError):
        raise
    except OSError as e:
        raise ConfigError(f"{key}: '{path}' cannot be read: {e.strerror}.") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"{key}: '{path}' is not UTF-8 (byte {e.start}). Save it as UTF-8 text.") from e
    except RecursionError as e:
        raise ConfigError(f"{key}: '{path}' is nested too deeply.") from e
    except (yaml.YAMLError, ValueError) as e:
        mark = getattr(e, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        problem = getattr(e, "problem", None) or getattr(e, "reason", None) or str(e).splitlines()[0]
        raise ConfigError(f"{key}: '{path}' is no YAML of plain values: {problem}{where}.") from e
    if not isinstance(settings, dict):
        kind = "nothing" if settings is None else f"a {type(settings).__name__}"
        raise ConfigError(f"{key}: '{path}' holds {kind}; expected a mapping, such as 'model: ...'.")
    return settings


def _count(value: Any, key: str, path: str, above: tuple[int, ...], count: list[int]) -> None:
    """Count the values as a parser meets them, which follows every alias, and refuse too many."""
    count[0] += 1
    if count[0] > _NODES:
        raise ConfigError(f"{key}: the aliases of '{path}' repeat more than {_NODES:,} values.")
    if not isinstance(value, dict | list):
        return
    if id(value) in above:
        raise ConfigError(f"{key}: an alias of '{path}' refers to what it is a part of.")
    for part in [*value, *value.values()] if isinstance(value, dict) else value:
        _count(part, key, path, (*above, id(value)), count)
