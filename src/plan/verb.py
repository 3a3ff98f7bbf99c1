"""Estimate what a run will cost before it is started: ``python -m src.cli plan --config ...``.

Everything that ``fit`` accepts is accepted, and nothing is loaded: the stage's own step runs on tensors
without data (:mod:`src.plan.trace`). Batches count as full and every token as supervised, so a real run needs
rather less. Hours are operations divided by the peak speed of the device and an assumed efficiency; with
``--trial`` by the speed of some steps that are run (:mod:`src.plan.trial`), whose memory counts then too.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import asdict
from typing import Any

from rich.table import Table

from src.command import Parser, new_file, show
from src.data.options import amount
from src.errors import ConfigError
from src.files import write_json
from src.mask import git_sha
from src.plan.advice import Advice, advise, label
from src.plan.devices import GIB, device, this_machine
from src.plan.experiment import Experiment
from src.plan.planner import Estimate, Planner
from src.plan.trial import check, tried
from src.ranges import Range, inside_unit, positive

AS_IT_STANDS = "--trial: it runs the config as it stands; leave out --ratio and --length."


def main(argv: list[str]) -> None:
    """Plan the run, print the tables and the recommendation, write the JSON."""
    args, rest = _parse(argv)
    planner = Planner(
        Experiment(rest, args.ratio, args.length),
        device(args.device or (args.trial and this_machine()) or "cpu"),
        args.devices,
        args.tokens,
    )
    if args.trial:
        if args.length and planner.experiment.data.get("max_length"):
            raise ConfigError(AS_IT_STANDS)
        check(args.trial, planner)
        planner.tried(tried(rest, planner.experiment.stage, args.trial))
    configured = planner.configured
    advice = advise(planner, args.disk)
    record = summary(planner, configured, advice)
    record["trial"], record["within"] = args.trial, None
    record["trial_bytes"] = planner.held
    if args.hours:
        steps = planner.within(args.hours)
        record["within"] = {
            "hours": args.hours,
            "steps": steps,
            "tokens": steps * planner.tokens // planner.steps,
        }
    _print(record, configured, advice)
    if args.json:
        command = shlex.join(["python", "-m", "src.cli", "plan", *argv])
        write_json(args.json, {"command": command, "commit": git_sha(), **record})


def summary(planner: Planner, configured: Estimate, advice: Advice) -> dict[str, Any]:
    """Return the plan as plain values: counts, bytes, operations and hours.

    Args:
        planner: planner of the run.
        configured: cost of the config as it stands.
        advice: the way that is recommended.
    """
    traced, device, experiment = planner.trace(), planner.device, planner.experiment
    size = planner.cache
    return {
        "stage": experiment.stage,
        "model": experiment.name,
        "parameters": {
            "parent": traced.parent,
            "student": experiment.student_parameters(),
            "trained": traced.trainable,
        },
        "budgets": [asdict(budget) for budget in experiment.budgets] if experiment.stage == "search" else [],
        "rows": {"count": experiment.rows.count, "length": experiment.rows.length},
        "steps": planner.steps,
        "tokens": planner.tokens,
        "distinct_tokens": experiment.distinct(planner.tokens),
        "calibration_passes": planner.calibration,
        "remembered_bytes": planner.remembered,
        "repair": experiment.repairs,
        "cache_bytes": {"raw": size.raw, "expected": size.expected},
        "checkpoint_bytes": planner.checkpoints,
        "device": {
            "name": device.name, "title": device.title, "memory": device.memory, "tflops": device.tflops,
            "efficiency": device.efficiency, "source": device.source,
        },
        "configured": _estimate(configured),
        "recommended": {
            "way": None if advice.best is None else _estimate(advice.best),
            "options": list(advice.options),
            "reason": advice.reason,
        },
    }  # fmt: skip


def _estimate(e: Estimate) -> dict[str, Any]:
    return {
        "teacher": e.setting.mode,
        "strategy": e.setting.strategy,
        "ranks": e.setting.ranks,
        "checkpoint_activations": e.checkpoint,
        "precision": e.precision,
        "parts": e.parts,
        "total": e.total,
        "fits": e.fits,
        "flops": e.flops,
        "hours": e.hours,
    }


def _print(plan: dict[str, Any], configured: Estimate, advice: Advice) -> None:
    spec, counts = plan["device"], plan["parameters"]
    ranks = configured.setting.ranks
    source = f"as {plan['trial']} steps reached" if plan["trial"] else "an assumption"
    run = Table(title=f"{plan['stage']} of {plan['model']}, {ranks} x {spec['title']}", show_header=False)
    facts = {
        "parameters of the parent": f"{counts['parent']:,}",
        "after the cut": f"{counts['student']:,}" if counts["student"] else "",
        "layers removed": ", ".join(b["told"] or str(b["remove"]) for b in plan["budgets"]),
        "trained": f"{counts['trained']:,}" if counts["trained"] else "",
        "batch of a rank": f"{plan['rows']['count']} x {plan['rows']['length']} tokens",
        "steps": f"{plan['steps']:,}" if plan["stage"] != "cache" else "",
        "tokens processed, at most": f"{plan['tokens']:,}",
        "distinct tokens, at most": f"{plan['distinct_tokens']:,}" if plan["distinct_tokens"] else "",
        "cache of these tokens": f"{plan['cache_bytes']['expected'] / 1e9:,.2f} GB ("
        f"{plan['cache_bytes']['raw'] / 1e9:,.2f} before compression)",
        "checkpoints that stay": f"{plan['checkpoint_bytes'] / 1e9:,.2f} GB"
        if plan["checkpoint_bytes"]
        else "",
        "streams that masks share": f"{plan['remembered_bytes'] / GIB:,.2f} GiB, at most"
        if plan["remembered_bytes"]
        else "",
        "memory of the trial": f"{plan['trial_bytes'] / GIB:,.2f} GiB" if plan["trial"] else "",
        "repair before the first step": "not counted" if plan["repair"] else "",
        "operations": f"{configured.flops:.3g}",
        "hours": f"{configured.hours:,.2f} (at {spec['efficiency']:.0%} of the peak: {source})",
    }
    if fits := plan["within"]:
        key = "limit_predict_batches" if plan["stage"] == "cache" else "max_steps"
        told = f"--trainer.{key} {fits['steps']}, at most {fits['tokens']:,} tokens"
        facts[f"in {fits['hours']:g} hours"] = told if fits["steps"] else "no step"
    for key, value in facts.items():
        if value:
            run.add_row(key, value)
    show(run)
    ways = [("as configured", configured)]
    if advice.best is not None and advice.best != configured:
        ways.append(("recommended", advice.best))
    memory = Table(title=f"Peak memory of a rank, GiB; {spec['memory'] / GIB:,.1f} are there")
    memory.add_column("part")
    for name, _ in ways:
        memory.add_column(name, justify="right")
    for part in configured.parts:
        memory.add_row(part, *(f"{way.parts[part] / GIB:,.2f}" for _, way in ways))
    memory.add_row("all", *(f"{way.total / GIB:,.2f}" for _, way in ways))
    memory.add_row("fits", *("yes" if way.fits else "no" for _, way in ways))
    memory.add_row("hours", *(f"{way.hours:,.2f}" for _, way in ways))
    memory.add_row("", *(label(way) for _, way in ways))
    show(memory)
    print(advice.reason)
    for option in advice.options:
        print(f"  {option}")


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(
        "plan",
        "Tell memory, time and disk of a run before it starts. All other options are those of fit: "
        "--config, overlays, dotted keys. A model may be the JSON file of a config, such as "
        "--model.init_args.model configs/models/qwen3-32b.json.",
    )
    add = parser.add_argument
    add(
        "--device",
        help="a name in configs/devices.json, such as h100 (default: cpu; with --trial this machine)",
    )
    add("--devices", type=positive, metavar="N", help="how many (default: as the config says)")
    add(
        "--ratio",
        type=inside_unit,
        metavar="X",
        help="share of layers to remove, for a recovery without a mask yet",
    )
    add("--length", type=positive, metavar="T", help="tokens of a row (default: data.max_length)")
    add(
        "--tokens",
        type=amount,
        metavar="N",
        help="tokens of the run, such as 500M (default: as the config says)",
    )
    add(
        "--disk",
        type=amount,
        metavar="BYTES",
        help="what a cache may take, such as 100G (default: no limit)",
    )
    add(
        "--trial",
        type=positive,
        metavar="N",
        help="run N steps here after a first one, on its weights and text, for hours and memory; nothing is "
        "kept",
    )
    add(
        "--hours",
        type=Range(float, 0, 1e6, open="low"),
        metavar="X",
        help="say also how many steps fit into so many hours",
    )
    add("--json", type=new_file, metavar="FILE", help="write the plan as JSON")
    args, rest = parser.parse_known_args(argv)
    if args.trial and args.ratio:
        parser.error(AS_IT_STANDS)
    return args, rest
