"""From what the jobs wrote to the results file: figures of each run, intervals and verdicts of each row."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from safetensors.torch import load_file

from scripts.arena.plan import Run
from scripts.arena.work import Work
from scripts.lab.results import JSON
from src.data.distinct import Distinct
from src.evaluate.flips import flips
from src.evaluate.intervals import Array, Interval, interval, verdict

Row = tuple[str, str, float]
"""Group, variant and ratio."""

METRICS = {"exact_match": True, "kl": False}
"""Figures that are compared, and whether more of them is better."""
COST = ("seconds", "cpu_seconds", "peak_mib", "commit")


def gather(work: Work) -> list[JSON]:
    """A row for each variant and ratio, in the order of the plan; runs that are not done are left out."""
    teacher = work.teacher.read()
    done: dict[Row, dict[int, tuple[JSON, JSON]]] = {}
    for run in work.plan.runs:
        if found := collect(work, run, teacher):
            done.setdefault((run.group, run.variant, run.ratio), {})[run.seed] = found
    rows = []
    for (group, variant, ratio), runs in done.items():
        name = work.plan.references[group]
        told = {"group": group, "variant": variant, **work.plan.names[group, variant], "ratio": ratio}
        row: JSON = {**told, "reference": name, "runs": [told for told, _ in runs.values()]}
        judged = {seed: judgements for seed, (_, judgements) in runs.items()}
        row |= {stage: figures(judged, stage) for stage in next(iter(judged.values()))}
        if reference := done.get((group, name, ratio)):
            row["difference"] = compare(judged, {seed: theirs for seed, (_, theirs) in reference.items()})
        rows.append(row)
    return rows


def collect(work: Work, run: Run, teacher: JSON) -> tuple[JSON, JSON] | None:
    """Figures of one run, and its judgements by stage; None if a part is missing."""
    search = work.search(run)
    if not search.result.exists():
        return None
    found = search.read()
    jobs = {"learned": work.cut(run, found["learned"]), "cut": work.cut(run, found["removed"])}
    if run.recover is not None:
        jobs["recovered"] = work.recover(run, found["removed"])
    if not all(job.result.exists() for job in jobs.values()):
        return None
    judged = {stage: job.read() for stage, job in jobs.items()}
    told: JSON = {"seed": run.seed, "search_seed": run.search_seed}
    told |= {key: found[key] for key in ("removed", "learned")}
    told["search"] = {key: found[key] for key in ("tokens", "metrics", *COST)}
    told |= {stage: judgement(result, teacher) for stage, result in judged.items()}
    if recovered := judged.get("recovered"):
        keys = ("tokens", "steps", "fit_seconds", "measured", *COST)
        told["recovery"] = {key: recovered[key] for key in keys if key in recovered}
        files = [result["rows"] for result in (found, recovered) if "rows" in result]
        if len(files) == 2:  # what a search and its recovery share counts once
            told["distinct_tokens"] = Distinct().unite(load_file(file)["rows"] for file in files).tokens
    return told, judged


def judgement(result: JSON, teacher: JSON) -> JSON:
    """Figures of a judged model beside its teacher."""
    tokens = sum(result["sums"]["tokens"])
    means = {key: sum(result["sums"][key]) / tokens for key in ("kl", "agreement", "loss")}
    told = {**means, "perplexity": float(np.exp(means["loss"])), "parameters": result["parameters"]}
    if "correct" not in result:
        return told
    own, other = ([mark == "1" for mark in judged["correct"]] for judged in (result, teacher))
    ratio = sum(own) / sum(other) if any(other) else None
    return {"exact_match": sum(own) / len(own), "ratio": ratio, "flips": flips(own, other), **told}


def figures(judged: dict[int, JSON], stage: str) -> dict[str, Interval]:
    """Every compared figure of one stage, pooled over seeds, with its interval."""
    return {metric: interval(*sums(judged, stage, metric, judged)) for metric in metrics(judged)}


def metrics(judged: dict[int, JSON]) -> list[str]:
    """The compared figures that were measured: of texts there is no exact match."""
    return [key for key in METRICS if key == "kl" or "correct" in next(iter(judged.values()))["cut"]]


def compare(own: dict[int, JSON], reference: dict[int, JSON]) -> JSON:
    """Own minus the reference's figures, over the seeds that both have.

    Final models are compared; ``learned`` is the divergence of the methods' plain answers, not recovered.
    """
    common = sorted(own.keys() & reference.keys())
    if not common:
        return {"seeds": []}
    stages = {metric: (final(own), final(reference), metric) for metric in metrics(own)}
    stages["learned"] = ("learned", "learned", "kl")
    out: JSON = {"seeds": common}
    for name, (stage, other, metric) in stages.items():
        mine, sizes = sums(own, stage, metric, common)
        theirs, _ = sums(reference, other, metric, common)
        difference = interval(mine - theirs, sizes)
        out[name] = {**difference, "verdict": verdict(difference, METRICS[metric])}
    return out


def final(judged: dict[int, JSON]) -> str:
    """The stage that a row is compared by."""
    return "recovered" if "recovered" in next(iter(judged.values())) else "cut"


def sums(judged: dict[int, JSON], stage: str, metric: str, seeds: Iterable[int]) -> tuple[Array, Array]:
    """A figure's sum on each problem by seed ``[S, I]``, and what to divide by ``[I]``."""
    results = [judged[seed][stage] for seed in seeds]
    if metric == "exact_match":
        rights = np.array([[mark == "1" for mark in result["correct"]] for result in results], dtype=float)
        return rights, np.ones(rights.shape[1])
    return np.array([each["sums"][metric] for each in results]), np.array(results[0]["sums"]["tokens"])
