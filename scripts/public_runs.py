"""Judged runs of the public model side by side, seeds among them: masks, divergences, tasks, costs.

    python -m scripts.public_runs --public DIR --runs NAME ...

A run is a directory as ``make public-model`` leaves it: 25, or 25-s1 for another seed. On each task, the
recovered model is compared with the cut that it comes from, on the same documents.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from scripts.lab.pages import table
from scripts.lab.results import JSON, options, read, write
from scripts.public_model import costs
from src.errors import ConfigError
from src.evaluate.flips import flips
from src.mask import Mask

HEAD = "run | removed | held-out KL | WikiText KL | tasks, of the parent's"
STAGES = ("cut", "recovered")


def judged(run: Path) -> JSON:
    """What a run's files tell: the cut, and the model recovered from it.

    Returns:
        ``run``, its name; ``removed``, layers counted from 0; ``held_out`` and ``wikitext``, KL of both in
        nats; ``share``, of both: mean accuracy as a share of the teacher's; ``tasks``, of each: accuracies
        of both, and the flips of the recovered model against the cut (:func:`src.evaluate.flips.flips`);
        ``stages``, planned and taken (:func:`scripts.public_model.costs`).
    """
    tasks = read(run / "tasks.json")
    found: JSON = {"run": run.name, "removed": list(Mask.load(run / "search/mask.json").removed)}
    for name, file in (("held_out", "held_out"), ("wikitext", "evaluate")):
        if models := read(run / f"{file}.json").get("models"):
            found[name] = dict(zip(STAGES, (model["kl"] for model in models), strict=True))
    teacher, cut, recovered = (
        {name: task["acc"] for name, task in each["tasks"].items()}
        for each in (tasks["teacher"], *tasks["models"])
    )
    means = [mean(task["score"] for task in each.values()) for each in (teacher, cut, recovered)]
    found["share"] = {stage: score / means[0] for stage, score in zip(STAGES, means[1:], strict=True)}
    found["tasks"] = {
        name: {"cut": cut[name]["score"], "recovered": task["score"], **flips(right(task), right(cut[name]))}
        for name, task in recovered.items()
    }
    found["stages"] = costs(run)
    return found


def right(task: JSON) -> list[bool]:
    """Whether a model is right on each document."""
    return [digit == "1" for digit in task["correct"]]


def lines(found: JSON) -> list[str]:
    """The table of all runs, from the cut to the recovered model; *p* tells these two apart."""
    names = list(found["runs"][0]["tasks"])
    rows = (
        [
            run["run"],
            ", ".join(map(str, run["removed"])),
            *map(fall, (run.get("held_out"), run.get("wikitext"))),
            "{cut:.1%} to {recovered:.1%}".format(**run["share"]),
            *("{cut:.3f} to {recovered:.3f}  (p = {p:.2g})".format(**run["tasks"][name]) for name in names),
        ]
        for run in found["runs"]
    )
    return [*table(" | ".join([HEAD, *names]), rows), "", f"`{found['command']}`"]


def fall(kl: JSON | None) -> str:
    """A divergence before and after recovery, and what is left of it; "-" if it was not measured."""
    if kl is None:
        return "-"
    return f"{kl['cut']:.4f} to {kl['recovered']:.4f}  ({kl['recovered'] / kl['cut']:.3f}x)"


def main() -> None:
    """Write ``results/public_runs.json``.

    Raises:
        ConfigError: a run is not judged.
    """
    args = options(
        __doc__, public=(Path("logs/public-model"), "directory of the runs"),
        runs=(["22", "25", "25-s1", "25-s2"], "names of the runs"),
    )  # fmt: skip
    runs = [args.public / name for name in args.runs]
    if lacking := [run.name for run in runs if not (run / "tasks.json").is_file()]:
        raise ConfigError(f"--runs: no tasks.json of {', '.join(lacking)}; make public-seeds judges them.")
    write(Path("results/public_runs.json"), {"runs": [judged(run) for run in runs]})


if __name__ == "__main__":
    main()
