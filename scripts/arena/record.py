"""The results file: what is done now beside what was published, each row with its own provenance."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from pathlib import Path

from scripts.arena.gather import gather, judgement
from scripts.arena.plan import Plan
from scripts.arena.work import Work
from scripts.lab.results import JSON, origin
from scripts.lab.results import read as results
from src.errors import ConfigError
from src.models.layers import num_layers
from src.models.loading import load_config

Name = tuple[str, str]
"""Group and variant."""
ORIGIN = ("command", "commit")
"""What each row says of its origin."""


def record(work: Work, plan: Plan, asked: Container[Name], failed: Sequence[str], known: JSON) -> JSON:
    """The whole file after some work on ``plan``.

    Args:
        work: the jobs of what was asked for, and of what that is compared with.
        plan: the whole plan.
        asked: variants whose published rows are replaced.
        failed: what went wrong.
        known: the published file, or nothing.
    """
    teacher, made = work.teacher.read(), origin()
    recover = next((run.recover for run in plan.runs if run.recover), None)
    trained = Path(plan.teacher, "training.json")
    kept = {place(row): row for row in published(plan, known)}
    done = {place(row): row | {key: made[key] for key in ORIGIN} for row in gather(work)}
    new = {key: row for key, row in done.items() if key[:2] in asked or key not in kept}
    order = dict.fromkeys((run.group, run.variant, run.ratio) for run in plan.runs)
    about = {
        "path": plan.teacher, "problems": len(teacher["sums"]["tokens"]), **judgement(teacher, teacher),
        "training_tokens": results(trained).get("tokens"), "layers": num_layers(load_config(plan.teacher)),
    }  # fmt: skip
    settings = {"cache": plan.cache and plan.cache.content, "recover": recover and recover.content}
    rows = [(kept | new)[key] for key in order if key in kept | new]
    head = {"name": plan.name, "teacher": about, "data": dict(plan.data), "settings": settings}
    return {**made, **head, "failed": list(failed), "rows": rows}


def place(row: JSON) -> tuple[str, str, float]:
    """What a row is about."""
    return row["group"], row["variant"], row["ratio"]


def published(plan: Plan, known: JSON) -> list[JSON]:
    """Rows of the published file that were measured on the same teacher and problems."""
    if known.get("data") != dict(plan.data) or known["teacher"]["path"] != plan.teacher:
        return []
    then, names = {key: known[key] for key in ORIGIN}, plan.names
    named = ((place(row)[:2], row) for row in known["rows"])
    return [{**then, **row, **names[name]} for name, row in named if name in names]


def only(plan: Plan, names: Sequence[str]) -> tuple[Plan, set[Name]]:
    """The plan with some variants, or groups, and what they are compared with; and which were asked for.

    Raises:
        ConfigError: a name is neither a variant, a group nor ``group.variant``.
    """
    asked = set[Name]()
    for name in names:
        every = ((run.group, run.variant) for run in plan.runs)
        found = {each for each in every if name in (*each, ".".join(each))}
        if not found:
            known = ", ".join(dict.fromkeys(run.variant for run in plan.runs))
            raise ConfigError(f"--only: '{name}' given; accepted: a group, or a variant of {known}.")
        asked |= found
    compared = {(group, plan.references[group]) for group, _ in asked}
    wanted = tuple(run for run in plan.runs if (run.group, run.variant) in asked | compared)
    return replace(plan, runs=wanted), asked
