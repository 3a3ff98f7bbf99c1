"""Every option of every verb, with values of the wrong type, no number, out of range, huge, empty or missing.

The options are the parsers' own. Whatever is given, there is no traceback and no hang: the value is accepted,
or one message with status 2 says why not, and nothing is left behind.
"""

from __future__ import annotations

import argparse
import importlib
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import Namespace

from src.cli import TOOLS, main
from src.command import Parser
from src.errors import ConfigError
from src.training.arguments import PruneCLI, ShortErrors

SEARCH, RECOVER, CACHE = (
    "configs/search/gumbel_topk.yaml", "configs/recover/entropy_kd.yaml", "configs/cache/topk.yaml",
)  # fmt: skip
VALUES = (
    "words",
    "nan",
    ".nan",
    ".inf",
    "-.inf",
    "-1",
    "0",
    "1e300",
    "9" * 40,
    "[]",
    "{}",
    "null",
    "",
    "\u2603",
)
NUMBERS = re.compile(r"nan|inf|1e300|9{40}")
RUNS_FOR_LONG = {"trainer.max_steps", "trainer.max_epochs", "trainer.min_steps", "trainer.min_epochs"}
SECONDS = 10


@contextmanager
def no_hang() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.alarm(SECONDS * 6)  # of a shared machine's clock
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


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
    "evaluate": ["--model", "m", "--data", "d"],
    "benchmark": ["--model", "m", "--baseline", "b"],
    "report": ["--run", "r"],
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
        typed = action.type is not None and action.type is not Path
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


@pytest.mark.slow
def test_every_option_with_every_value(
    tmp_path: Path,
    teacher_dir: str,
    corpus_file: str,
    mask_file: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whole runs: at least 500 of the cases, each accepted or refused in one message."""
    out, small = (
        tmp_path / "out",
        ["--data.batch_size=4", "--trainer.max_steps=1", "--trainer.accelerator=cpu"],
    )
    shared = [f"--data.train={corpus_file}", f"--trainer.logger.save_dir={out}", *small]
    held = [f"--data.validation={corpus_file}"]
    fits = {
        "search": ["fit", "--config", SEARCH, f"--model.model={teacher_dir}", "--model.calibration_batches=1",
                   *shared, *held],
        "recovery": ["fit", "--config", RECOVER, f"--model.mask={mask_file}", *shared, *held],
        "cache": ["predict", "--config", CACHE, f"--model.model={teacher_dir}", f"--model.out={out}/cache",
                  f"--data.train={corpus_file}", f"--trainer.logger.save_dir={out}",
                  "--trainer.accelerator=cpu"],
    }  # fmt: skip
    tools = {
        "plan": ["--config", SEARCH, "--model.model", teacher_dir],
        "export": ["--mask", mask_file, "--out", f"{out}/export"],
        "patch": ["--mask", mask_file, "--out", f"{out}/patch", "--data", corpus_file, "--rows", "2"],
        "evaluate": ["--model", teacher_dir, "--data", corpus_file, "--limit", "2", "--max-new-tokens", "1"],
        "benchmark": ["--model", teacher_dir, "--baseline", teacher_dir, "--repeats", "1"],
        "report": ["--run", str(tmp_path)],
        "preview": ["--config", SEARCH, "--model.init_args.model", teacher_dir,
                    f"--data.init_args.train={corpus_file}"],
    }  # fmt: skip
    cases = [
        [*start, f"--{key}={value}"]
        for stage, start in fits.items()
        for key in keys_of(parse(EXPERIMENTS[stage][0], "--config", *EXPERIMENTS[stage][1:]))
        for value in VALUES
        if not (key in RUNS_FOR_LONG and value == "-1")
    ]
    cases += [
        [verb, *start, f"{action.option_strings[-1]}={value}"]
        for verb, start in tools.items()
        for action in tool_options(verb)
        for value in VALUES
    ]
    known = len(cases)
    cases = cases[:: known // 600]  # every option, each with some of the values
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "configs").symlink_to(Path("configs").resolve())
    monkeypatch.syspath_prepend(str(Path.cwd()))
    monkeypatch.chdir(tmp_path / "here")
    wrong, refused = list[str](), 0
    for argv in cases:
        before = set(Path.cwd().iterdir())
        try:
            with no_hang():
                main(list(argv))
            code: Any = 0
        except SystemExit as stop:
            code = stop.code
        except BaseException as error:
            code = f"{type(error).__name__}: {str(error)[:150]}"
        told = capsys.readouterr().err
        refused += code == 2
        new = set(Path.cwd().iterdir()) - before  # what is accepted may write where it is told to
        left = [path.name for path in [*tmp_path.rglob("*.partial"), *(new if code == 2 else ())]]
        if code not in (0, 2, None) or left or "Traceback" in told:
            wrong.append(f"{argv[0]} {argv[2]} {argv[-1]}: {code} {left}")
            with capsys.disabled():
                print(wrong[-1], flush=True)
    with capsys.disabled():
        print(f"{len(cases)} of {known} cases, {refused} refused, {len(wrong)} wrong", flush=True)
    assert len(cases) >= 500
    assert not wrong, "\n".join(wrong)
