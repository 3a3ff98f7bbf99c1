"""Every judged run of the public model in one table: masks, divergences, tasks; seeds side by side.

    python -m scripts.public_runs --public DIR

A run is a directory as ``make public-model`` leaves it: 25, or 25-s1 for another seed. Of each task, the
recovered model is compared with the cut that it comes from, on the same documents.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from scripts.lab.pages import fill, table
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
        nats; ``tasks``, of both: mean accuracy as a share of the teacher's; ``recovered``, for each task:
        ``acc``, and the flips of the recovered model against the cut (:func:`src.evaluate.flips.flips`);
        ``hours`` of the recovery, as planned and as taken, none without a plan.
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
    found["tasks"] = {stage: score / means[0] for stage, score in zip(STAGES, means[1:], strict=True)}
    found["recovered"] = {
        name: {"acc": task["score"], **flips(right(task), right(cut[name]))}
        for name, task in recovered.items()
    }
    found["hours"] = costs(run).get("recover", {}).get("hours", ())
    return found


def right(task: JSON) -> list[bool]:
    """Whether a model is right on each document."""
    return [digit == "1" for digit in task["correct"]]


def lines(found: JSON) -> list[str]:
    """The table of all runs, from the cut to the recovered model; *p* tells these two apart."""
    names, rows = list(found["runs"][0]["recovered"]), []
    for run in found["runs"]:
        tasks = (run["recovered"][name] for name in names)
        rows.append([
            run["run"],
            ", ".join(map(str, run["removed"])),
            *map(fall, (run.get("held_out"), run.get("wikitext"))),
            "{cut:.1%} to {recovered:.1%}".format(**run["tasks"]),
            *("{acc:.3f}  (p = {p:.2g})".format(**task) for task in tasks),
            " / ".join(f"{hours:.2f}" for hours in run["hours"]) or "-",
        ])  # fmt: skip
    head = " | ".join([HEAD, *names, "hours of the recovery, planned / taken"])
    return [*table(head, rows), "", f"`{found['command']}`"]


def fall(kl: JSON | None) -> str:
    """A divergence before and after recovery, and what is left of it; "-" if it was not measured."""
    if kl is None:
        return "-"
    return f"{kl['cut']:.4f} to {kl['recovered']:.4f}  ({kl['recovered'] / kl['cut']:.3f}x)"


def main() -> None:
    """Write ``results/public_runs.json``, and fill the table of docs/public_model.md.

    Raises:
        ConfigError: no run there is judged.
    """
    args = options(__doc__, public=(Path("logs/public-model"), "directory of the runs"))
    runs = sorted(file.parent for file in args.public.glob("*/tasks.json"))
    if not runs:
        raise ConfigError(f"--public: '{args.public}' holds no judged run; run: make public-model.")
    write(at := Path("results/public_runs.json"), {"runs": [judged(run) for run in runs]})
    fill(Path("docs/public_model.md"), lines(read(at)), "runs")


if __name__ == "__main__":
    main()
