"""A sweep that was killed ends as one that was not: the same trials, none twice, in the order of its seed."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from src.errors import ConfigError
from src.files import write_json
from src.mask import Mask
from src.sweep import settings, trials, verb
from tests.faults.runs import ended

optuna = pytest.importorskip("optuna", reason="needs the extra sweep")
pytestmark = pytest.mark.slow
KEYS = {"x.lr": {"low": 1e-3, "high": 1.0, "log": True}, "x.n": {"low": 1, "high": 8}, "x.form": ["a", "b"]}


class Trials:
    """Stands where trials run: it notes each, and leaves what a search leaves, at once.

    Attributes:
        stops: number of the call that is interrupted, as by a kill.
        fails: what the trials that fail are told by.
    """

    def __init__(self) -> None:
        self.calls: list[dict[str, str]] = []
        self.stops, self.fails = 0, "none"

    def finish(self, argv: list[str], name: str, log: Path) -> int:
        given = dict(word[2:].split("=", 1) for word in argv if word.startswith("--") and "=" in word)
        logger = "trainer.logger.init_args"
        place = Path(given[f"{logger}.save_dir"], given[f"{logger}.name"], given[f"{logger}.version"])
        self.calls.append({key: given[key] for key in KEYS})
        place.mkdir()
        if len(self.calls) == self.stops:
            raise KeyboardInterrupt
        log.write_text("error: it is wrong\n")
        if given["x.form"] == self.fails:
            return 2
        off = (math.log(float(given["x.lr"])) + 3) ** 2 + (int(given["x.n"]) - 4) ** 2
        write_json(place / "record.json", {"tokens": 1, "seconds": 1.0, "metrics": {"val/kl": off}})
        model = {"class_path": "src.search.MaskSearch", "init_args": {k[2:]: given[k] for k in KEYS}}
        (place / "config.yaml").write_text(yaml.safe_dump({"model": model}))
        Mask("m", 4, (0, 1, 3), "x", metrics={"kl": off / 2}).save(place / "mask.json")
        return 0


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Trials:
    found = Trials()
    monkeypatch.setattr(trials, "finish", found.finish)
    monkeypatch.setattr(settings, "parsed", lambda argv: None)
    return found


def sweep(folder: Path, name: str, **changes: Any) -> list[str]:
    """The arguments of a sweep of 20 trials into ``folder/name``."""
    given = {
        "config": "e.yaml",
        "keys": KEYS,
        "metric": "kl",
        "direction": "minimize",
        "trials": 20,
        "seed": 3,
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(given | {"out": str(folder / name)} | changes, sort_keys=False))
    return ["--config", str(file)]


def kept(folder: Path) -> list[tuple[int, str, dict[str, Any], float | None]]:
    """All trials of a study."""
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{folder}/study.db")
    return [(trial.number, trial.state.name, trial.params, trial.value) for trial in study.trials]


def test_twenty_trials_killed_once_are_those_of_an_unkilled_sweep(
    tmp_path: Path, double: Trials, capsys: pytest.CaptureFixture[str]
) -> None:
    verb.main(sweep(tmp_path, "whole"))
    whole, double.calls = double.calls, []
    assert len(whole) == 20
    for double.stops in (7, 16):  # once among the random trials, once among those that follow from others
        with pytest.raises(KeyboardInterrupt):
            verb.main(sweep(tmp_path, "torn"))
    double.stops = 0
    capsys.readouterr()
    verb.main(sweep(tmp_path, "torn"))
    assert double.calls == whole[:7] + whole[6:15] + whole[14:], "the one at hand is run again, no other"
    assert kept(tmp_path / "torn") == kept(tmp_path / "whole")
    said = capsys.readouterr().out
    numbers = [int(line.split()[1]) for line in said.splitlines() if line.startswith("trial ")]
    assert numbers == [15, 16, 17, 18, 19, 20]
    values = [value for _, _, _, value in kept(tmp_path / "whole")]
    best = values.index(min(values))
    assert f"best: trial {best + 1}, kl {values[best]:.6g}" in said
    last = shlex.split(said.splitlines()[-1])
    assert last == ["python", "-m", "src.cli", "fit", "--config", "e.yaml",
                    *(f"--{key}={value}" for key, value in whole[best].items())]  # fmt: skip
    table = json.loads((tmp_path / "torn" / "compare.json").read_text())
    assert [run["mask_kl"] for run in table["runs"]] == sorted(values), "the best first"
    assert set(table["settings"]) == {f"search: model.init_args.{key[2:]}" for key in KEYS}
    verb.main(sweep(tmp_path, "torn"))
    assert len(double.calls) == 22, "all are done"


def test_the_seed_is_what_trials_follow_from_and_more_of_them_may_be_asked_for(
    tmp_path: Path, double: Trials
) -> None:
    verb.main(sweep(tmp_path, "one", trials=3))
    verb.main(sweep(tmp_path, "other", trials=3, seed=4))
    verb.main(sweep(tmp_path, "one", trials=5))
    verb.main(sweep(tmp_path, "again", trials=5))
    one, other, again = double.calls[:3] + double.calls[6:8], double.calls[3:6], double.calls[8:]
    assert one == again
    assert all(a != b for a, b in zip(one, other, strict=False))
    assert len(kept(tmp_path / "one")) == 5
    with pytest.raises(ConfigError, match=r"holds a sweep with other settings \(metric\)"):
        verb.main(sweep(tmp_path, "one", metric="val/kl"))


def test_the_largest_is_the_best_where_it_is_asked_for(
    tmp_path: Path, double: Trials, capsys: pytest.CaptureFixture[str]
) -> None:
    verb.main(sweep(tmp_path, "most", trials=5, metric="val/kl", direction="maximize"))
    values = [value for _, _, _, value in kept(tmp_path / "most")]
    assert f"best: trial {values.index(max(values)) + 1}, val/kl" in capsys.readouterr().out


def test_trials_that_fail_count_are_told_and_are_never_the_best(
    tmp_path: Path, double: Trials, capsys: pytest.CaptureFixture[str]
) -> None:
    double.fails = "a"
    verb.main(sweep(tmp_path, "some", trials=8))
    states = [(state, params["x.form"]) for _, state, params, _ in kept(tmp_path / "some")]
    assert {*states} == {("FAIL", "a"), ("COMPLETE", "b")}
    assert len(double.calls) == len(states) == 8
    said = capsys.readouterr().out
    assert said.count("error: it is wrong (") == sum(state == "FAIL" for state, _ in states)


def test_a_sweep_of_failures_ends_and_what_found_nothing_may_be_mended(
    tmp_path: Path, double: Trials
) -> None:
    hopeless = {**KEYS, "x.form": ["a"]}
    double.fails = "a"
    with pytest.raises(ConfigError, match="the first 3 trials have all failed"):
        verb.main(sweep(tmp_path, "bad", keys=hopeless))
    assert len(double.calls) == 3
    double.fails = "none"
    with pytest.raises(
        ConfigError, match="metric: 'lk' given; figures of a trial: kl, seconds, tokens, val/kl"
    ):
        verb.main(sweep(tmp_path, "bad", metric="lk"))
    verb.main(sweep(tmp_path, "bad", trials=2))
    assert [(number, state) for number, state, *_ in kept(tmp_path / "bad")] == [
        (0, "COMPLETE"),
        (1, "COMPLETE"),
    ]


def test_real_trials_are_killed_with_their_sweep_and_the_best_command_gives_its_figure(
    tmp_path: Path, teacher_dir: str, corpus_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "real"
    fixed = {
        "trainer.max_steps": 3, "trainer.accelerator": "cpu", "model.init_args.model": teacher_dir,
        "data.init_args.train": corpus_file, "data.init_args.validation": corpus_file, "threads": 1,
        "data.init_args.batch_size": 3, "model.init_args.calibration_batches": 2,
    }  # fmt: skip
    keys = {"model.init_args.draws": [2, 3], "config": [None, "configs/unit/half.yaml"]}
    given = sweep(tmp_path, "real", config="configs/search/gumbel_topk.yaml", keys=keys, set=fixed, trials=2)
    command = [sys.executable, "-m", "src.cli", "sweep", *given]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    while not (out / "trial_2").exists():
        time.sleep(0.05)
        assert first.poll() is None
    done = (out / "trial_1" / "record.json").read_text()
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert sum(state == "RUNNING" for _, state, *_ in kept(out)) == 1
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert (out / "trial_1" / "record.json").read_text() == done
    assert [(number, state) for number, state, *_ in kept(out)] == [(n, "COMPLETE") for n in range(2)]
    values = [Mask.load(out / f"trial_{n}" / "mask.json").metrics["kl"] for n in (1, 2)]
    assert [value for *_, value in kept(out)] == values
    best = shlex.split(said.splitlines()[-1])[3:]
    logger = "trainer.logger.init_args"
    assert ended([*best, f"--{logger}.save_dir={tmp_path}", f"--{logger}.version=again"]) == 0
    assert Mask.load(tmp_path / "search" / "again" / "mask.json").metrics["kl"] == min(values)
