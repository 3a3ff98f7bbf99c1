"""Sweep over settings with one file: ``python -m src.cli sweep --config configs/sweep/gumbel_topk.yaml``.

Each trial is a ``fit`` in a process of its own, in ``<out>/trial_<number>``. The same command after an
interruption goes on. Options that are not of the sweep itself go to every trial.
"""

from __future__ import annotations

import torch

from src.command import Parser, named
from src.errors import ConfigError
from src.report import compare
from src.sweep.settings import Sweep
from src.sweep.study import check_installed, ranked, study_of, values_of
from src.sweep.trials import work
from src.training.lock import lock


def main(argv: list[str]) -> None:
    """Run the trials that are left, compare all, and print the command of the best.

    Raises:
        ConfigError: Optuna is missing, the file is at fault, or no trial has succeeded.
    """
    parser = Parser("sweep", "Try settings of fit with Optuna; further options go to every trial.")
    parser.add_argument(
        "--config", required=True, type=named, metavar="FILE", help="what is swept (docs/sweep.md)"
    )
    args, more = parser.parse_known_args(argv)
    check_installed()
    if any(word.partition("=")[0] == "--threads" for word in argv):
        more.append(f"--threads={torch.get_num_threads()}")
    sweep = Sweep.read(args.config, more)
    with lock(sweep.out, "out"):
        study = study_of(sweep)
        work(study, sweep)
        best = ranked(study)
        if not best:
            raise ConfigError(f"sweep: none of the {sweep.trials} trials has succeeded.")
        if len(best) > 1:
            runs = [str(sweep.place(number)) for number in best]
            compare.main(
                [*runs, "--json", f"{sweep.out}/compare.json", "--html", f"{sweep.out}/compare.html"]
            )
    place, value = sweep.place(best[0]), study.trials[best[0]].value
    print(f"best: trial {best[0] + 1}, {sweep.metric} {value:.6g}, {place}")
    print(sweep.command(values_of(study, sweep, best[0])))
