"""Run the trials of a sweep, each in a process of its own, and tell of each as it ends."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from src.errors import ConfigError
from src.report.run import figures_of, read_record
from src.shorten.stages import finish
from src.sweep.settings import Sweep
from src.sweep.study import finished, ranked, tell, trials

if TYPE_CHECKING:
    import optuna

HOPELESS = 3
"""Trials that may fail before the first one that does not."""


def work(study: optuna.Study, sweep: Sweep) -> None:
    """Run the trials that are left, and tell of each as it ends.

    Raises:
        ConfigError: a trial has no figure of the metric's name, or the first ones have all failed.
        Stopped: a signal has ended the sweep; its trial runs again when the sweep goes on.
    """
    for trial in trials(study, sweep):
        values = {key.name: key.draw(trial) for key in sweep.keys}
        about = f"trial {trial.number + 1} of {sweep.trials}: {_words(values)}"
        print(about, flush=True)
        began = time.monotonic()
        value, fault = result(sweep, trial.number, values)
        tell(study, trial, value)
        took = f"in {time.monotonic() - began:.0f} s"
        if fault is not None:
            print(f"  failed {took}: {fault}", flush=True)
            _check_hope(study)
        else:
            best = study.best_trial
            told = f"{sweep.metric} {value:.6g} {took}; best {best.value:.6g}, trial {best.number + 1}"
            print(f"  {told}", flush=True)


def result(sweep: Sweep, number: int, values: dict[str, str]) -> tuple[float | None, str | None]:
    """Run a trial in its directory, anew.

    Args:
        sweep: what is swept.
        number: the trial's number, from 0.
        values: value of each key.

    Returns:
        The metric, and None; or None, and why the trial failed.

    Raises:
        ConfigError: the run has no figure of the metric's name.
    """
    place = sweep.place(number)
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    log = place.with_suffix(".log")
    if status := finish(sweep.argv(values, place), place.name, log):
        said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return None, f"{said[-1] if said else f'status {status}'} ({log})"
    found = figures(place)
    if sweep.metric not in found:
        known = ", ".join(sorted(found))
        raise ConfigError(f"metric: '{sweep.metric}' given; figures of a trial: {known}.")
    value = found[sweep.metric]
    return (value, None) if math.isfinite(value) else (None, f"{sweep.metric} is {value}")


def figures(place: Path) -> dict[str, float]:
    """Return the figures of a run by their names: of its record and its mask, and of each metric the last."""
    return {**figures_of(place), **read_record(place / "record.json").get("metrics", {})}


def _check_hope(study: optuna.Study) -> None:
    if finished(study) == HOPELESS and not ranked(study):
        raise ConfigError(
            f"sweep: the first {HOPELESS} trials have all failed, as is told above. Mend the settings, and "
            f"give the same command."
        )


def _words(values: dict[str, str]) -> str:
    """Return the values of keys in short: each key by its last word."""
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in values.items())
