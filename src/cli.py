"""Entry point of every stage: ``python -m src.cli <verb> ...``.

Lightning's verbs (fit, validate, test, predict) run the stages that train or write a cache; the table
``TOOLS`` adds all else.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import Any

from src.errors import ConfigError, did_you_mean
from src.training import stopping
from src.training.settings_file import check_settings_files

TOOLS = {
    "plan": (
        "src.plan.verb",
        "tell memory, hours and disk of a run before it starts: plan --config ... --device h100",
    ),
    "export": (
        "src.export.verb",
        "write the shortened model as a plain Hugging Face directory, proven equal",
    ),
    "patch": (
        "src.repair.verb",
        "export the cut model repaired behind each gap, without training, on a few rows",
    ),
    "generate": (
        "src.generate.verb",
        "let a model write rows to train on: generate --model M --prompts FILE --out own.jsonl",
    ),
    "grow": (
        "src.grow.verb",
        "larger models from a recovered one, without training: the parent's layers put back",
    ),
    "evaluate": ("src.evaluate.verb", "held-out KL, agreement, exact match; beside the teacher"),
    "benchmark": ("src.benchmark", "measured prefill and decode speed against another model and the ideal"),
    "report": ("src.report.verb", "gather a run's figures into a table, JSON, Markdown and HTML"),
    "compare": ("src.report.compare", "runs side by side: settings that differ, scores, costs, flips, masks"),
    "shorten": ("src.shorten.verb", "all of it with one command: shorten --model M --train FILE"),
    "sweep": ("src.sweep.verb", "try settings of fit with Optuna: sweep --config FILE, resumable"),
    "schema": ("src.schema", "describe the YAML of fit to editors, which then complete its keys"),
    "vision": ("src.vision.verb", "prune and merge the tokens of a small vision transformer, on digits"),
    "preview": ("src.data.preview", "print a few rows of a corpus with what is supervised"),
}
"""Module of each tool, imported only when the tool is asked for, and what the tool does."""
VERBS = {
    "fit": "run a search or a recovery: fit --config configs/search/gumbel_topk.yaml",
    "validate": "held-out divergence of a search or a recovery",
    "test": "the same, once, at the end",
    "predict": "write the teacher's cache: predict --config configs/cache/topk.yaml",
}


def _help() -> str:
    lines = ["usage: python -m src.cli <verb> [options]        (<verb> --help for its options)", ""]
    texts = {**VERBS, **{verb: text for verb, (_, text) in TOOLS.items()}}
    lines += [f"  {verb:<10} {text}" for verb, text in texts.items()]
    return "\n".join(lines)


def run(argv: list[str]) -> Any:
    """Run one command line: a tool of the table, or one of Lightning's verbs.

    Returns:
        After a verb of Lightning the :class:`PruneCLI` that ran it, else None.

    Raises:
        ConfigError: the user asked for something that cannot be done.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return None
    check_settings_files(argv[1:])
    if argv[0] in TOOLS:
        return importlib.import_module(TOOLS[argv[0]][0]).main(argv[1:])
    if argv[0] not in VERBS:
        raise ConfigError(f"unknown verb '{argv[0]}'.{did_you_mean(argv[0], [*VERBS, *TOOLS])}\n{_help()}")
    from src.training.running import lightning

    return lightning(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the command line; exit with status 2 at a user's fault, with 128 plus its number at a signal."""
    with stopping.heeded():  # before anything large is imported
        try:
            _run_to_the_end(sys.argv[1:] if argv is None else argv)
        except stopping.Stopped as stop:
            stopping.end(stop)


def _run_to_the_end(argv: list[str]) -> None:
    from src.training import watchdog
    from src.training.arguments import user_fault
    from src.training.quiet import quieten

    quieten()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    watchdog.watch_parent()
    try:
        run(argv)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads what is printed has had enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(128 + signal.SIGPIPE) from None
    except Exception as error:
        if (
            number := stopping.received()
        ):  # what was ended, such as a collective among ranks, fails in its own way
            raise stopping.Stopped(number) from error
        if message := watchdog.explain(error):  # first: a load that runs out of memory is a fault too
            print(message, file=sys.stderr)
            raise SystemExit(1) from None
        if fault := user_fault(error):
            print(f"error: {fault}", file=sys.stderr)
            raise SystemExit(2) from None
        raise


if __name__ == "__main__":
    stopping.unheeded()
    main()
