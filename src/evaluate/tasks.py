"""Judge models on public tasks beside their teacher: ``python -m src.cli evaluate --tasks piqa,arc_easy``.

The lm-evaluation-harness (:mod:`src.evaluate.harness`) words the prompts and keeps the score. Teacher and
students answer the same documents in one run. So each score stands beside its ratio to the teacher's, the
difference with its paired interval, and the number of documents that only one of the two has right (flips).
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

from rich.table import Table

from src.command import each_model, provenance, show
from src.evaluate.flips import CHANGE, difference, flips
from src.evaluate.harness import ask, harness, load_tasks
from src.files import write_json
from src.models.loading import load_tokenizer

Scores = dict[str, dict[str, dict[str, Any]]]
"""By task and metric: ``score``; ``stderr``, if the harness gives one; ``correct``, one bool a document, if a
document is right or wrong; beside a teacher also ``ratio`` and ``flips``."""


def main(args: argparse.Namespace, argv: list[str]) -> None:
    """Judge the models on ``args.tasks``, print the table, and write the JSON, which notes ``argv``."""
    began = time.monotonic()
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    tasks = load_tasks(names, args.include_path, args.data_dir)
    tokenizer = load_tokenizer(args.teacher or args.model[0])
    results, output, origin = list[dict[str, Any]](), dict[str, Any](), dict[str, Any]()
    for result, model in each_model(args, tokenizer):
        size, how = args.batch_size, (args.chat, args.max_new_tokens)
        output = ask(model, tokenizer, tasks, args.num_fewshot, args.limit, size, *how)
        results.append(result | {"tasks": scores(output)})
        origin = provenance("evaluate", argv, model) | {"lm_eval": harness("").__version__}
        del model
    if args.teacher:
        for result in results[1:]:
            compare(result["tasks"], results[0]["tasks"])
    facts = describe(output)
    if not args.no_table:
        show(summary(results, facts))
    if args.out:
        for metric in (m for r in results for metrics in r["tasks"].values() for m in metrics.values()):
            if "correct" in metric:
                metric["correct"] = "".join("01"[ok] for ok in metric["correct"])
        first = 1 if args.teacher else 0
        figures = {"teacher": results[0] if first else None, "models": results[first:], "tasks": facts}
        write_json(args.out, figures | origin | {"seconds": time.monotonic() - began})


def scores(output: dict[str, Any]) -> Scores:
    """Collect the metrics of each task from the output of :func:`src.evaluate.harness.ask`.

    A metric keeps the harness's name, such as ``acc``. If the harness filters answers before it scores them,
    the filter's name follows a comma: ``exact_match,strict``.
    """
    out: Scores = {}
    for task, values in output["results"].items():
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            entry: dict[str, Any] = {"score": float(value)}
            if isinstance(error := values.get(f"{metric}_stderr,{kind}"), float):
                entry["stderr"] = error
            samples = (s for s in output["samples"].get(task, []) if s["filter"] == kind and metric in s)
            given = [sample[metric] for sample in samples]
            # Right or wrong, and the score their mean: log-likelihoods and F1 counts are neither.
            if given and all(x in (0, 1) for x in given) and math.isclose(sum(given) / len(given), value):
                entry["correct"] = [bool(x) for x in given]
            out.setdefault(task, {})[metric if kind == "none" else key] = entry
    return out


def compare(student: Scores, teacher: Scores) -> None:
    """Add to each metric of the student, in place, how it compares with the teacher's.

    ``ratio`` is the student's score over the teacher's; it is left out if the teacher's is 0. ``flips``
    (:func:`src.evaluate.flips.flips`) is added if each answer is either right or wrong.
    """
    for task, metrics in student.items():
        for name, own in metrics.items():
            other = teacher[task][name]
            if other["score"]:
                own["ratio"] = own["score"] / other["score"]
            if "correct" in own and "correct" in other:
                own["flips"] = flips(own["correct"], other["correct"])


def describe(output: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return facts on each task in the output of :func:`src.evaluate.harness.ask`, by the task's name.

    They are ``shots``, ``documents`` (their number), ``version``, ``data`` (the data set), and
    ``less_is_better`` (a list of metrics).
    """
    keys, facts = ("dataset_path", "dataset_name", "dataset_kwargs"), dict[str, dict[str, Any]]()
    for task in output["results"]:
        config = output["configs"].get(task, {})
        better = output["higher_is_better"].get(task, {})
        facts[task] = {
            "shots": output["n-shot"].get(task),
            "documents": output["n-samples"].get(task, {}).get("effective"),
            "version": output["versions"].get(task),
            "data": {key: config[key] for key in keys if config.get(key)},
            "less_is_better": [metric for metric, more in better.items() if more is False],
        }
    return facts


def summary(results: list[dict[str, Any]], facts: dict[str, dict[str, Any]]) -> Table:
    """Return a table with a row for each task, metric and model.

    Args:
        results: results of each model, the teacher's first if there is one.
        facts: what :func:`describe` returned.
    """
    table = Table(title="public tasks")
    for heading in ("task", "metric", "model"):
        table.add_column(heading)
    for heading in ("score", "ratio", "difference [95 %]", "lost / gained"):
        table.add_column(heading, justify="right")
    for task, fact in facts.items():
        shots, documents = fact["shots"], fact["documents"]
        title = f"{task} ({shots}-shot, {documents})" if documents else task
        for metric in results[0]["tasks"].get(task, {}):
            label = metric + " (less is better)" * (metric.split(",")[0] in fact["less_is_better"])
            for result in results:
                entry = result["tasks"][task][metric]
                error = f" ± {entry['stderr']:.2g}" if "stderr" in entry else ""
                change = lost = "-"
                if "flips" in entry:
                    change = CHANGE.format(**difference(entry["flips"], len(entry["correct"])))
                    lost = "{lost} / {gained} (p {p:.2g})".format(**entry["flips"])
                table.add_row(
                    title,
                    label,
                    result["path"],
                    f"{entry['score']:.4g}{error}",
                    f"{entry['ratio']:.3f}" if "ratio" in entry else "-",
                    change,
                    lost,
                )
                title = label = ""
    return table
