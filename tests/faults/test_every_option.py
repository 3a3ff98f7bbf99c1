"""Every option of every verb is judged as it is parsed; the options are the parsers' own."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import Namespace

from src.cli import TOOLS, main
from src.command import Parser, named, new_file
from src.errors import ConfigError
from src.shorten.options import place
from src.training.arguments import PruneCLI, ShortErrors

SEARCH, RECOVER, CACHE = (
    "configs/search/gumbel_topk.yaml", "configs/recover/entropy_kd.yaml", "configs/cache/topk.yaml",
)  # fmt: skip


class ParseOnly(PruneCLI):
    """Parses and judges; builds nothing."""

    def instantiate_classes(self) -> None:
        """Nothing is built."""

    def before_instantiate_classes(self) -> None:
        """Nothing is read."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing runs."""


def parse(*argv: str) -> Namespace:
    keys: Any = {"subclass_mode_model": True, "subclass_mode_data": True}
    cli = ParseOnly(args=list(argv), parser_class=ShortErrors, auto_configure_optimizers=False,
                    save_config_callback=None, seed_everything_default=False, **keys)  # fmt: skip
    return cli.config[argv[0]]


def keys_of(config: Any, prefix: str = "") -> Iterator[str]:
    """Every key of a parsed experiment, without ``init_args``."""
    for key, value in vars(config).items():
        at = f"{prefix}.{key}".lstrip(".")
        if key in ("class_path", "config", "help") or at.startswith("trainer.callbacks"):
            continue
        below = value.get("init_args") if isinstance(value, Namespace) and "class_path" in value else value
        if isinstance(below, Namespace):
            yield from keys_of(below, at)
        if "class_path" not in vars(config):
            yield at


def tool_options(verb: str) -> list[argparse.Action]:
    """The options that a tool's parser knows."""
    found = list[argparse.Action]()

    def remember(parser: Parser, *_: Any, **__: Any) -> Any:
        found.extend(parser._actions)
        raise ConfigError("enough")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "parse_args", remember)
        patch.setattr(Parser, "parse_known_args", remember)
        with pytest.raises(ConfigError):
            importlib.import_module(TOOLS[verb][0]).main([])
    return [action for action in found if action.option_strings and action.dest != "help"]


EXPERIMENTS = {
    "search": ("fit", SEARCH, "--model.model=m", "--data.train=t"),
    "recovery": ("fit", RECOVER, "--model.mask=m", "--data.train=t"),
    "cache": ("predict", CACHE, "--model.model=m", "--data.train=t"),
}
NEEDED = {
    "plan": ["--config", SEARCH],
    "export": ["--mask", "m", "--out", "o"],
    "patch": ["--mask", "m", "--out", "o", "--data", "d"],
    "grow": ["--model", "m", "--data", "d", "--out", "o"],
    "evaluate": ["--model", "m", "--data", "d"],
    "generate": ["--model", "m", "--prompts", "p", "--out", "o"],
    "benchmark": ["--model", "m", "--baseline", "b"],
    "report": ["--run", "r"],
    "shorten": ["--model", "m", "--train", "t", "--dry-run"],
    "sweep": ["--config", "c"],
    "schema": [],
    "vision": [],
    "preview": ["--config", SEARCH],
}


@pytest.mark.parametrize("stage", EXPERIMENTS)
def test_every_number_of_an_experiment_is_judged_as_it_is_parsed(stage: str) -> None:
    """No number that is none, or is beyond all measure, comes through the parser; all are told at once."""
    verb, config, *more = EXPERIMENTS[stage]
    start = (verb, "--config", config, *more)
    numbers = [key for key, value in flat(parse(*start)) if isinstance(value, float)]
    assert len(numbers) >= 3
    for value in (".nan", ".inf", "-.inf"):
        with pytest.raises(ConfigError) as fault:
            parse(*start, *(f"--{key}={value}" for key in numbers))
        assert all(f"{key}: " in str(fault.value) for key in numbers)


def flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key in keys_of(config):
        value = config
        for part in key.split("."):
            value = value.init_args if isinstance(value, Namespace) and "init_args" in value else value
            value = value[part]
        yield key, value


@pytest.mark.parametrize("verb", NEEDED)
def test_every_option_of_a_tool_is_judged_as_it_is_parsed(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A typed option takes no word, no NaN, no infinity, nothing negative, empty or missing."""
    for action in tool_options(verb):
        option = action.option_strings[-1]
        typed = action.type not in (None, Path, new_file, named, place)
        for value in ("words", "nan", "inf", "-1", "", None) if typed or action.choices else (None,):
            given = [option] if value is None else [f"{option}={value}"]
            if value is None and action.nargs == 0:
                given = [f"{option}=words"]
            with pytest.raises(SystemExit) as stop:
                main([verb, *NEEDED[verb], *given])
            message = capsys.readouterr().err
            assert stop.value.code == 2
            assert option in message
            assert "Traceback" not in message
