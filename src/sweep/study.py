"""Keep what a sweep has tried in a SQLite file, from which it goes on as if it had not been interrupted.

The values of a trial follow from the sweep's seed, the trial's number and the trials before it, never from
how often the sweep was started. A trial that was interrupted is found as running, and comes again with the
values that it has: a sweep that was killed ends as one that was not.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from src.errors import ConfigError
from src.sweep.settings import Sweep

try:
    import optuna
    from optuna.trial import Trial, TrialState
except ImportError:  # an extra; the verb says so
    if not TYPE_CHECKING:
        optuna = None


def check_installed() -> None:
    """Refuse to sweep without Optuna.

    Raises:
        ConfigError: it is not installed.
    """
    if optuna is None:
        raise ConfigError("sweep: optuna is not installed: pip install -c constraints.txt -e '.[sweep]'")


def study_of(sweep: Sweep) -> optuna.Study:
    """Open the study of a sweep, or begin it; one that has found nothing yet begins anew with other settings.

    Raises:
        ConfigError: it was begun with other settings; names them.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    place = {"study_name": "sweep", "storage": f"sqlite:///{Path(sweep.out).resolve() / 'study.db'}"}
    study = optuna.create_study(**place, direction=sweep.direction, load_if_exists=True)
    was = study.user_attrs.get("sweep", sweep.identity)
    other = [name for name, value in sweep.identity.items() if was.get(name) != value]
    if other and ranked(study):
        raise ConfigError(
            f"out: '{sweep.out}' holds a sweep with other settings ({', '.join(other)}). Name another "
            f"directory, or remove it."
        )
    if other:
        optuna.delete_study(**place)
        study = optuna.create_study(**place, direction=sweep.direction)
    study.set_user_attr("sweep", sweep.identity)
    return study


def trials(study: optuna.Study, sweep: Sweep) -> Iterator[Trial]:
    """Yield the trials that are left: the one that was interrupted, then new ones."""
    for number in range(finished(study), sweep.trials):
        seed = np.random.SeedSequence([sweep.seed, number]).generate_state(1)
        study.sampler = optuna.samplers.TPESampler(seed=int(seed[0]), constant_liar=False)
        begun = study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
        yield Trial(study, begun[0]._trial_id) if begun else study.ask()


def tell(study: optuna.Study, trial: Trial, value: float | None) -> None:
    """Note what a trial has found; None notes that it failed."""
    study.tell(trial, value, state=TrialState.FAIL if value is None else None)


def ranked(study: optuna.Study) -> list[int]:
    """Return the numbers of the trials that have a figure, the best first."""
    done = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    sign = 1 if study.direction.name == "MINIMIZE" else -1
    return [trial.number for trial in sorted(done, key=lambda trial: sign * (trial.value or 0))]


def values_of(study: optuna.Study, sweep: Sweep, number: int) -> dict[str, str]:
    """Return the values of a trial's keys, as the command line takes them."""
    drawn = study.trials[number].params
    return {k.name: drawn[k.name] if k.choices else repr(drawn[k.name]) for k in sweep.keys}


def finished(study: optuna.Study) -> int:
    """Return how many trials have ended, well or not."""
    return sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))
