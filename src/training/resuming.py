"""Resume a run from its checkpoint alone: the settings that the run noted lie beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities import rank_zero_info

from src.errors import ConfigError
from src.training.settings_file import is_experiment, read_settings

HELP = (
    "checkpoint to go on from. Without --config the settings in the config.yaml of its run are used; options "
    "and overlays that are given here win over them. 'last' is the newest one of the run that is configured."
)
"""What ``--help`` says of the option."""
_PARTS = ("seed_everything", "trainer", "model", "data", "threads")
_WORDS = ("last", "best", "hpc", "registry")


def with_settings(argv: list[str]) -> list[str]:
    """Return a command line of a verb of Lightning, completed by the settings of the run that it resumes.

    It stays as it is where it names an experiment, or no checkpoint by its path. Else the settings that lie
    beside the checkpoint come first, so that everything given wins, and one line tells what is given. A fit
    goes on in the directory of its run.

    Args:
        argv: the command line; its first word is the verb.

    Raises:
        ConfigError: no settings lie beside the checkpoint, or they cannot be read.
    """
    verb, *given = argv
    pairs = list(_pairs(given))
    path = next((value for key, value in reversed(pairs) if key == "--ckpt_path"), None)
    if path is None or path in _WORDS or "://" in path or any(_names_experiment(*pair) for pair in pairs):
        return argv
    beside = (folder / "config.yaml" for folder in list(Path(path).parents)[:2])
    if (file := next(filter(Path.is_file, beside), None)) is None:
        raise ConfigError(
            f"--ckpt_path: no config.yaml lies beside '{path}' or one directory above, so the settings of "
            f"its run are unknown. Give the experiment too, with --config."
        )
    noted = read_settings(str(file), "--ckpt_path")
    settings = {part: noted[part] for part in _PARTS if part in noted}
    if verb == "fit":
        _go_on(settings, file.parent)
    changes = [f"{key} {value}".strip() for key, value in pairs if key != "--ckpt_path"]
    rank_zero_info(f"resume: settings of {file}" + f", but {', '.join(changes)}" * bool(changes))
    return [verb, "--config", yaml.safe_dump(settings), *given]


def _go_on(settings: dict[str, Any], directory: Path) -> None:
    """Give the logger that chose the version of a run, the first of several, the name that it chose."""
    loggers = settings.get("trainer", {}).get("logger")
    first = loggers[0] if isinstance(loggers, list) and loggers else loggers
    arguments = first.get("init_args", {}) if isinstance(first, dict) else {}
    if "version" in arguments and arguments["version"] is None:
        arguments["version"] = directory.resolve().name


def _names_experiment(key: str, value: str) -> bool:
    """Return whether an option brings a model of its own, not only changes of one."""
    if key in ("--config", "-c"):
        return not Path(value).is_file() or is_experiment(read_settings(value))
    return key == "--model"


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield options and their values, as ``--key value`` or ``--key=value`` gives them."""
    rest = list(words)
    while rest:
        key, equals, value = rest.pop(0).partition("=")
        if not equals and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        yield key, value
