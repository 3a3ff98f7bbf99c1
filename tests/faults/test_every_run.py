"""Every option of every verb, with values of the wrong type, no number, out of range, huge, empty or missing.

The options are the parsers' own; each meets one of the values, or two, as a seed chooses. Whatever is given,
there is no traceback and no hang: the run ends well, or one message with status 2 says why not and nothing is
left behind. Each run is a process of its own. What counts is the time of its processor, because on a busy
machine a sound run waits for longer than a bad one computes; what waits for ever is ended by the clock.
"""

from __future__ import annotations

import inspect
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import src.callbacks
from src.cli import main
from tests.faults.runs import apart
from tests.faults.test_every_option import CACHE, RECOVER, SEARCH, keys_of, parse, tool_options

VALUES = (
    "words", "nan", ".nan", ".inf", "-.inf", "-1", "0", "1e300", "9" * 40, "0.5", "true", "null", "",
    "[]", "{}", "[.nan]", "{words: -1}", ".", "/dev/zero", "\u2603", None,
)  # fmt: skip
"""None leaves the value out."""
CASES, PARTS, SEED = 600, 3, int(os.environ.get("E3_SEED", "0"))
SECONDS, WAIT = 10, 120
"""The most of the processor, and of the clock, that a run may take."""
ENDLESS = {f"--trainer.{key}" for key in ("max_steps", "max_epochs", "min_steps", "min_epochs")}
"""Options with which -1 means without end."""
EXPERIMENTS = {
    "search": ("fit", SEARCH, "unit/half", "policy/tinyfusion", "policy/concave"),
    "recovery": ("fit", RECOVER, "recover/hidden_states", "recover/linear_patch"),
    "cache": ("predict", CACHE),
}
"""Verb, config and overlays of each."""


class Case(NamedTuple):
    """A verb's sound arguments, and an option that gets a bad value."""

    stage: str
    sound: list[str]
    option: str
    callback: str = ""

    def argv(self, value: str | None) -> list[str]:
        """The command line; an argument of a callback stands in a mapping of YAML."""
        if self.callback:
            given = "" if value is None else f"{self.option}: {value or repr(value)}"
            alone = f"[{{class_path: src.callbacks.{self.callback}, init_args: {{{given}}}}}]"
            return [*self.sound, f"--trainer.callbacks={alone}"]
        return [*self.sound, self.option if value is None else f"{self.option}={value}"]


def cases(sound: dict[str, list[str]]) -> Iterator[Case]:
    """Every option of every verb: experiments, what an overlay adds to them, callbacks, tools."""
    for stage, (verb, config, *overlays) in EXPERIMENTS.items():
        known = set[str]()
        for overlay in (None, *overlays):
            more = ["--config", f"configs/{overlay}.yaml"] if overlay else []
            argv = [verb, "--config", config, *more, *sound[stage]]
            keys = dict.fromkeys(["config", *keys_of(parse(*argv))])
            yield from (Case(stage, argv, f"--{key}") for key in keys if key not in known)
            known |= keys.keys()
    for name in src.callbacks.__all__:
        argv = ["fit", "--config", SEARCH, *sound["search"]]
        keys = inspect.signature(getattr(src.callbacks, name)).parameters
        yield from (Case("callbacks", argv, key, name) for key in keys)
    for verb in sound.keys() - EXPERIMENTS.keys():
        yield from (Case(verb, [verb, *sound[verb]], a.option_strings[-1]) for a in tool_options(verb))


def sound(out: Path, model: str, rows: str, mask: str, small: str) -> dict[str, list[str]]:
    """Arguments with which each stage does little, and does it well; ``small`` is the model's cut."""
    logs = [f"--trainer.logger.save_dir={out}", "--trainer.accelerator=cpu", f"--data.train={rows}"]
    held_out = str(Path(rows).with_name("held_out.jsonl"))
    Path(held_out).write_text("".join(Path(rows).read_text().splitlines(keepends=True)[:20]))
    short = [*logs, f"--data.validation={rows}", "--data.batch_size=4", "--trainer.max_steps=1"]
    return {
        "search": [f"--model.model={model}", "--model.calibration_batches=1", *short],
        "recovery": [f"--model.mask={mask}", *short],
        "cache": [f"--model.model={model}", f"--model.out={out}/cache", *logs],
        "plan": ["--config", SEARCH, f"--model.init_args.model={model}", f"--data.init_args.train={rows}"],
        "export": ["--mask", mask, "--out", f"{out}/export"],
        "grow": ["--model", small, "--data", rows, "--rows", "2", "--out", f"{out}/grown"],
        "generate": ["--model", model, "--prompts", rows, "--limit", "2", "--max-new-tokens", "1",
                     "--out", f"{out}/own.jsonl"],
        "patch": ["--mask", mask, "--out", f"{out}/patch", "--data", rows, "--rows", "2"],
        "evaluate": ["--model", model, "--data", rows, "--limit", "2", "--max-new-tokens", "1"],
        "benchmark": ["--model", model, "--baseline", model, "--repeats", "1"],
        "report": ["--run", str(Path(mask).parent)],
        "shorten": [
            "--model", model, "--train", rows, "--held-out", held_out, "--run", f"{out}/run", "--dry-run",
            "--search=--data.init_args.batch_size=2 --model.init_args.draws=1",
            "--recover=--data.init_args.batch_size=2",
        ],
        "preview": ["--config", SEARCH, f"--model.init_args.model={model}", f"--data.init_args.train={rows}"],
    }  # fmt: skip


def judged(argv: list[str], said: Path) -> tuple[str, str]:
    """Run; what came of it, and what is wrong with that."""
    process = apart(argv, said, seconds=SECONDS)
    process.join(WAIT)
    if process.exitcode is None or process.exitcode == -signal.SIGXCPU:
        process.kill()
        process.join()
        return "hang", "it does not end"
    told = said.read_text(errors="replace")
    if "Traceback" in told or process.exitcode not in (0, 2):
        return "traceback", f"status {process.exitcode}: {told[-300:]}"
    if process.exitcode == 2 and told.count("error:") != 1:
        return "messages", told[-300:]
    return ("refused" if process.exitcode else "accepted"), ""


def litter(tmp_path: Path, here: Path, out: Path, refused: bool) -> list[str]:
    """Files that a run leaves and should not: temporary ones, and of a refused run all."""
    left = [*tmp_path.rglob(".*.partial"), *tmp_path.rglob(".*.old")]
    left += [f for f in (*here.rglob("*"), *out.rglob("*")) if refused and not f.is_symlink() and f.is_file()]
    return [str(f.relative_to(tmp_path)) for f in left]


def tried(known: list[Case]) -> Iterator[tuple[Case, str | None]]:
    """Cases and values: every option once, and some again."""
    rng = random.Random(SEED)
    for case in [*known, *rng.sample(known, CASES - len(known))]:
        value = rng.choice(VALUES)
        while case.option in ENDLESS and value == "-1":
            value = rng.choice(VALUES)
        yield case, value


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_whatever_an_option_is_given_the_run_ends_well_or_says_why_not(
    part: int,
    tmp_path: Path,
    teacher_dir: str,
    corpus_file: str,
    mask_file: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, out, said = tmp_path / "here", tmp_path / "out", tmp_path / "said"
    small = str(tmp_path / "small")
    main(["export", "--mask", mask_file, "--out", small])
    known = sorted(cases(sound(out, teacher_dir, corpus_file, mask_file, small)))
    counts, wrong = Counter[str](), list[str]()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv(
        "PYTHONPATH", str(Path.cwd())
    )  # of what the runs are forked from, which starts elsewhere
    configs = Path("configs").resolve()
    for case, value in list(tried(known))[part::PARTS]:
        shutil.rmtree(here, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
        here.mkdir()
        (here / "configs").symlink_to(configs)
        monkeypatch.chdir(here)
        argv = case.argv(value)
        came, fault = judged(argv, said)
        left = litter(tmp_path, here, out, came == "refused")
        counts.update(["cases", came, *["litter"] * bool(left)])
        if fault or left:
            wrong.append(f"{case.stage} {argv[-1]}: {came} {fault} {left}")
        with capsys.disabled():
            print(case.stage, argv[-1], came, fault, left, flush=True)
    with capsys.disabled():
        print(f"{len(known)} options, seed {SEED}, part {part}: {dict(counts)}", flush=True)
    assert counts["cases"] == CASES / PARTS
    assert not wrong, "\n".join(wrong)
