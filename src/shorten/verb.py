"""Shorten a model of your own with one command: ``python -m src.cli shorten --model M --train FILE``.

It looks at model, text and machine, prints the settings that it chooses with their reasons, and runs the
stages: search, recovery, exports of the cut and the recovered model, evaluation, benchmark, report. The same
command again goes on where it was interrupted; a stage whose inputs have not changed does not run again.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from rich.table import Table

from src.command import show
from src.data.content import fingerprint
from src.data.options import read_columns, sources
from src.data.sources import Source, find_files
from src.errors import ConfigError
from src.export.write import check_out
from src.files import misfit, write_json, write_text
from src.models.fingerprint import identity
from src.plan.experiment import Experiment
from src.shorten.options import POLICIES, columns_of_evaluate, columns_of_fit, held_out, parse
from src.shorten.settings import RECOVER, SEARCH, Choice, benchmark_lengths, choose, fitted
from src.shorten.stages import Stage, earlier, foreign, work_through
from src.shorten.text import JUDGED, SHARE, hold_out, look, untold
from src.training.lock import lock

SETTINGS, LOG = "settings.json", "stages.json"
HELD_OUT = "held_out.jsonl"
"""File in the run's directory with the rows to judge by, if the user names none."""


def main(argv: list[str]) -> None:
    """Choose settings, print them, and run the stages."""
    args = parse(argv)
    run = Path(args.run or f"logs/shorten/{Path(args.model).name}")
    if (fault := misfit(run / SETTINGS)) is not None:
        raise ConfigError(f"--run: '{run}' cannot be written: {fault}.")
    if args.out:
        check_out(Path(args.out), True, args.model)
        _check_apart(args, run)
    facts = _facts(args)
    choices, options, notes = settled(args, run, facts)
    _tell(args.model, choices, notes)
    found = stages(args, run, options, facts)
    if args.dry_run:
        print("\n".join(stage.command for stage in found))
        return
    with lock(run, "--run"):
        work_through(found, run / LOG)


def settled(
    args: argparse.Namespace, run: Path, facts: list[str | None]
) -> tuple[list[Choice], dict[str, list[str]], list[str]]:
    """Return the settings of a run, those that it began with if model, text and wishes are still the same.

    Otherwise settings are chosen anew, and rows are held out anew. A dry run writes what its commands name,
    but leaves what an earlier command has written.

    Args:
        args: what the user asks for.
        run: the run's directory, which keeps the settings in ``settings.json``.
        facts: fingerprints of the model and the texts.

    Returns:
        The settings; the options of each stage that follow from model and text; and what the planner says.

    Raises:
        ConfigError: a setting cannot be chosen, or another command is at work in the directory.
    """
    about: dict[str, Any] = {k: str(v) for k, v in vars(args).items() if k not in ("run", "dry_run")}
    about["facts"], kept, held = facts, run / SETTINGS, run / HELD_OUT
    known = earlier(kept, dict, list)
    if known and known.keys() != {"about", "choices", "options", "notes"}:
        raise foreign(kept)
    anew = known.get("about") != about
    stays = args.dry_run and anew and bool(known)
    if held.exists() and not known:
        raise foreign(held)
    rows = (
        hold_out(args.model, args.train, read_columns(args))
        if not args.held_out and (anew or not held.exists())
        else None
    )
    if anew:
        known = {"about": about, **_chosen(args, rows)}
    if stays:
        print(
            f"note: '{run}' holds another command's run, which stays; for these commands give another --run."
        )
    elif anew or rows:
        with lock(run, "--run"):  # another command may be at work here by these settings and rows
            if anew:
                held.unlink(missing_ok=True)
                write_json(kept, known)  # before the rows: rows beside no settings are not this command's
            if rows:
                write_text(held, rows)
    return [Choice(*each) for each in known["choices"]], known["options"], known["notes"]


def _chosen(args: argparse.Namespace, rows: str | None = None) -> dict[str, Any]:
    """Choose the settings, and ask the planner how each stage is run here; ``rows`` are those held out."""
    columns = read_columns(args)
    if judged := held_out(args):
        look(args.model, judged, columns)  # that it can be read
    choices, notes = list(choose(args.model, look(args.model, args.train, columns), args.tokens)), list[str]()
    options: dict[str, list[str]] = {}
    if hidden := untold(args.model, rows, judged or args.train, columns):
        options["evaluate"] = ["--supervise", "all", "--no-exact-match"]
        told = f"{hidden.split(' Set data.supervise')[0]} Nothing is matched exactly."
        notes.append(f"evaluate: all tokens are judged, not those of answers alone: {told}")
    share: float | None = None
    for stage, configs in (("search", _search(args)), ("recover", [RECOVER])):
        own = [part for choice in choices if choice.stage == stage for part in choice.argv]
        own += [*_what(args)] if stage == "search" else []
        own += _split(f"--{stage}", getattr(args, stage))
        files = [part for config in configs for part in ("--config", config)]
        experiment = Experiment([*files, *own, f"--model.init_args.model={args.model}"], share)
        advice, where = fitted(experiment)
        share = experiment.share  # the mask that a recovery is planned for does not exist yet
        if advice is None or advice.best is None:
            notes.append(f"{stage}: not planned on {where}")
        else:
            minutes = 60 * advice.best.hours
            time = f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} hours"
            notes.append(f"{stage} on {where}, about {time} by its operations: {advice.reason}")
            own += [part for option in advice.options for part in shlex.split(option)]
        options[stage] = own
    listed = [[c.stage, c.option, c.value, c.reason] for c in choices]
    return {"choices": listed, "options": options, "notes": notes}


def _split(option: str, text: str) -> list[str]:
    """Return the parts of a quoted list of options, as a shell would."""
    try:
        return shlex.split(text)
    except ValueError as e:
        raise ConfigError(f"{option}: {text!r} given; it ends inside of a quotation.") from e


def _what(args: argparse.Namespace) -> list[str]:
    """Return the options of the search that say what is removed, and how much."""
    given = {"ratio": args.ratio, "unit": args.unit}
    for key in ("remove", "target"):
        if getattr(args, key) is not None:
            given |= {"ratio": "null", key: getattr(args, key)}
    return [f"--model.init_args.{key}={value}" for key, value in given.items()]


def stages(
    args: argparse.Namespace, run: Path, options: dict[str, list[str]], facts: list[str | None]
) -> list[Stage]:
    """Return the stages of a run in order.

    Args:
        args: what the user asks for.
        run: the run's directory.
        options: options of ``fit`` for search and recovery, and those of ``evaluate``.
        facts: fingerprints of the model and the texts.
    """
    mask, cut, out = run / "search/mask.json", run / "cut", Path(args.out or run / "recovered")
    search = ["--model.init_args.model", args.model, *options["search"]]
    recover = ["--model.init_args.mask", str(mask), *options["recover"]]
    export = ["export", "--mask", str(mask), "--force", "--out"]
    last = str(run / "recover/checkpoints/last.ckpt")
    scores, speeds, exported = run / "evaluate.json", run / "benchmark.json", ("cut", "export")
    rows = [
        "--data",
        args.held_out or str(run / HELD_OUT),
        "--limit",
        str(JUDGED),
        *columns_of_evaluate(args),
        *options.get("evaluate", []),
    ]
    judge = ["evaluate", "--teacher", args.model, *rows, "--out", str(scores), "--no-table"]
    lengths = benchmark_lengths(args.model)
    race = ["benchmark", "--baseline", args.model, *lengths, "--out", str(speeds), "--no-table"]
    both, read = ("--model", str(cut), str(out)), tuple(facts)
    return [
        Stage(
            "search", _fit(args, run, "search", _search(args), search), run / "search", mask.name,
            (), read, resumes=True,
        ),
        Stage(
            "recover", _fit(args, run, "recover", [RECOVER], recover), run / "recover", "record.json",
            ("search",), read, resumes=True,
        ),
        Stage("cut", (*export, str(cut)), cut, "config.json", ("search",)),
        Stage("export", (*export, str(out), "--checkpoint", last), out, "config.json", ("recover",)),
        Stage("evaluate", (*judge, *both), scores, after=exported),
        Stage("benchmark", (*race, *both), speeds, after=exported),
        Stage("report", ("report", "--run", str(run)), run / "report.html", after=("evaluate", "benchmark")),
    ]  # fmt: skip


def _check_apart(args: argparse.Namespace, run: Path) -> None:
    """Refuse an ``--out`` that another stage of the run writes to, or that holds the run.

    Raises:
        ConfigError: names what it would replace.
    """
    out, empty = Path(args.out).resolve(), {"search": list[str](), "recover": list[str]()}
    places = [stage.place for stage in stages(args, run, empty, []) if stage.name != "export"]
    for place in (*places, run / SETTINGS, run / HELD_OUT, run / LOG):
        if out.is_relative_to(there := place.resolve()) or there.is_relative_to(out):
            raise ConfigError(
                f"--out: '{args.out}' given, and the run keeps '{place}' there; accepted: a directory of its "
                f"own. Without it the model is '{run / 'recovered'}'."
            )


def _facts(args: argparse.Namespace) -> list[str | None]:
    """Return what tells model and texts apart from others under their names.

    Raises:
        ConfigError: there is no such model or text, or a file is to train and to judge; names the option.
    """
    texts: list[list[tuple[str | None, str | None]]] = []
    for option, given in (("train", args.train), ("held_out", held_out(args))):
        if given is not None:
            try:
                texts.append([_rows(source) for source in sources(given, f"data.{option}")])
            except ConfigError as e:
                raise ConfigError(f"--{option.replace('_', '-')}: {e}") from e
    if len(texts) == 2 and {rows for rows in texts[0] if rows[0]} & {*texts[1]}:
        raise ConfigError(
            f"--held-out: '{args.held_out}' holds rows of --train, and a model is not judged by what it was "
            f"trained on. Name other rows, or leave it out: {SHARE:.0%} of the text is kept apart then."
        )
    return [identity(args.model), *(fact for rows in texts for fact, _ in rows)]


def _rows(source: Source) -> tuple[str | None, str | None]:
    """Return the fingerprint of a source; and its split on the Hub, where all splits have one fingerprint."""
    on_hub = find_files(source) is None and not Path(source.path).is_dir()
    return fingerprint(source), (source.split or "train") if on_hub else None


def _search(args: argparse.Namespace) -> list[str]:
    """Return the config files of the search: the shipped one, and the method's overlay."""
    return [SEARCH, *([str(POLICIES / f"{args.method}.yaml")] if args.method else [])]


def _fit(
    args: argparse.Namespace, run: Path, stage: str, configs: list[str], own: list[str]
) -> tuple[str, ...]:
    """Return a ``fit`` into the run's directory, which resumes from its last checkpoint if there is one."""
    judged = held_out(args)
    held = (
        ("validation", judged if isinstance(judged, str) else json.dumps(judged))
        if judged
        else ("held_out", SHARE)
    )
    logger = {"save_dir": run, "name": stage, "version": ""}
    data = {"train": args.train, "tokenizer": args.model, **dict([held])}
    keys = {
        **{f"data.init_args.{key}": value for key, value in data.items()},
        **{f"trainer.logger.init_args.{key}": value for key, value in logger.items()},
        "seed_everything": args.seed, "ckpt_path": "last",
    }  # fmt: skip
    files = [part for config in configs for part in ("--config", config)]
    drawn = ["data", *(["model.init_args.policy"] if stage == "search" else [])] if args.seed else []
    seeds = [part for what in drawn for part in (f"--{what}.init_args.seed", str(args.seed))]
    return (
        "fit",
        *files,
        *columns_of_fit(args),
        *seeds,
        *own,
        *(part for k, v in keys.items() for part in (f"--{k}", str(v))),
    )


def _tell(model: str, choices: list[Choice], notes: list[str]) -> None:
    table = Table(title=f"Settings for {model}")
    for heading in ("stage", "option", "value", "because"):
        table.add_column(heading)
    for choice in choices:
        table.add_row(choice.stage, choice.option, str(choice.value), choice.reason)
    show(table)
    print("\n".join(notes))
