"""Export the cut model as a plain Hugging Face directory, proven before it gets its name.

``python -m src.cli export --mask logs/run/mask.json [--checkpoint logs/run/last.ckpt] --out DIRECTORY``

Everything is written beside ``--out`` under a temporary name. In memory the parent with hard gates must equal
the cut model. Then a fresh process that knows only the directory must compute from it what the model in
memory computes (:mod:`src.export.fresh`). Only then is the directory renamed. A fault, a full disk or a kill
leaves nothing under the final name, and an existing directory stays as it was unless ``--force`` is given.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel

from src.command import Parser, on_device
from src.errors import ConfigError
from src.export.card import front_matter, model_card
from src.export.companions import copy_companions, parent_files, parent_tokenizer, stored_heads
from src.export.cuts import earlier_cuts, note_cut
from src.export.fresh import unique_weights
from src.export.observe import GENERATED, Finding
from src.export.parent import true_parent
from src.export.proof import predicted_weights, prove, stored_as_parent
from src.files import whole
from src.mask import Mask
from src.models.cut import cut
from src.models.cut_rules import extra_layers
from src.models.layers import num_layers
from src.models.loading import load_config, load_model, load_tokenizer
from src.models.positions import position_limit, too_long
from src.ranges import MOST, Range
from src.repair.linear_patch import LinearPatch
from src.training import checkpoints
from src.training.scopes import load_student

SHORTEST = 8
"""Fewest tokens of a sequence of the proof: padding covers some, and the rest must still be a sequence."""
DTYPES = ("float32", "bfloat16", "float16")


def export(mask: Mask, args: argparse.Namespace, repair: LinearPatch | None = None) -> list[Finding]:
    """Export the cut model, by the options ``args``, after a repair if given; return the proof's findings.

    Raises:
        ConfigError: an option is at fault, the family cannot express the mask, or a check fails.
    """
    out, name = Path(args.out).resolve(), args.model or mask.model
    _check_out(out, args.force, name)
    revision = mask.revision if name == mask.model else None
    config = load_config(name, revision)
    mask.check(num_layers(config), name)
    files = parent_files(name, revision)
    tokenizer = parent_tokenizer(name, revision, files)
    parent = on_device(load_model(name, revision, dtype=args.dtype or "auto"), args.device)
    record = checkpoints.record(args.checkpoint) if args.checkpoint else None
    made_for, mask = mask.model, true_parent(mask, name, record, args.any_parent)
    _check_proof_tokens(parent, args.proof_tokens)
    student = load_student(parent, mask, args.checkpoint) if args.checkpoint else cut(parent, mask)
    student, rounding = stored_as_parent(student, parent, mask, args.proof_tokens)
    folds = repair and repair(student, parent, mask, load_tokenizer(name, revision))
    before = earlier_cuts(parent.config)
    note_cut(student.config, mask)
    weights = unique_weights(parent.state_dict()), predicted_weights(parent, student, mask)
    with staged(out, args.force) as stage:
        if (files / "generation_config.json").is_file():
            student.generation_config = GenerationConfig()  # the parent's own file takes its place
        student.save_pretrained(stage)
        for file in stage.glob("*.safetensors"):  # written readable by their owner alone
            shutil.copymode(stage / "config.json", file)
        copy_companions(files, stage)
        mask.save(stage / "mask.json")
        findings = rounding + prove(
            stage,
            parent,
            student,
            mask,
            recovered=bool(args.checkpoint or folds),
            weights=weights[1],
            tokenizer=tokenizer,
            tokens=args.proof_tokens,
            upcast=args.proof_dtype == "float32",
        )
        failed = [f"{f.check}: {f.detail}" for f in findings if not f.passed]
        if failed:
            raise ConfigError(f"export: the proof failed, '{out}' is not written. {'; '.join(failed)}.")
        card = model_card(
            mask,
            weights,
            findings,
            front_matter(files / "README.md"),
            recovery=record and record["recovery"],
            made_for=made_for,
            license_name=args.license,
            data=args.data if folds or repair is None else None,  # a repair without a gap used no rows
            lost_heads=max(extra_layers(config), stored_heads(files, num_layers(config))),
            repair=str(repair) if folds else None,
            before=before,
        )
        (stage / "README.md").write_text(card)
    return findings


@contextmanager
def staged(out: Path, force: bool) -> Iterator[Path]:
    """Give a temporary directory beside ``out``, which is renamed to ``out`` if the block ends without error.

    Args:
        out: the final name.
        force: replace what has this name.

    Raises:
        ConfigError: it cannot be written, or something else has taken the name meanwhile.
    """
    try:
        with whole(out, replace=force) as stage:
            stage.mkdir()
            yield stage
            _check_free(out, force)
    except (OSError, SafetensorError) as e:
        state = "What was there stays." if out.exists() else "Nothing is left there."
        raise ConfigError(f"--out: cannot write '{out}': {e}. {state}") from e


def _check_out(out: Path, force: bool, parent: str) -> None:
    here, there = out.resolve(), Path(parent).resolve()
    if there.is_dir() and (here.is_relative_to(there) or there.is_relative_to(here)):
        raise ConfigError(
            f"--out: '{out}' is the directory of the parent '{parent}', lies inside it or contains it; it is "
            f"not written, even by --force. Give a directory beside it."
        )
    _check_free(out, force)


def _check_proof_tokens(parent: PreTrainedModel, tokens: int | None) -> None:
    limit = position_limit(parent)
    if limit is not None and (tokens or 0) + GENERATED > limit:
        excess = f"--proof-tokens {tokens} with the {GENERATED} generated behind them are too many: a row"
        raise too_long(f"{excess} has {(tokens or 0) + GENERATED} tokens", parent.config.model_type, limit)


def _check_free(out: Path, force: bool) -> None:
    if out.exists() and not force:
        raise ConfigError(f"--out: '{out}' exists. Give another name, or --force to replace it.")
    if out.exists() and not (out / "config.json").is_file():
        raise ConfigError(
            f"--out: '{out}' holds no model (no config.json); it is not replaced, even by --force."
        )


def main(argv: list[str]) -> None:
    """Export a cut model and print its proof."""
    args = _parse(argv)
    mask = Mask.load(args.mask)
    show(mask, args, export(mask, args))


def show(mask: Mask, args: argparse.Namespace, findings: list[Finding]) -> None:
    """Print the findings of a proof as a table, under the mask and the name ``args.out`` of the export."""
    table = Table("check", "finding", title=escape(f"{args.out}: {mask}"))
    for finding in findings:
        table.add_row(finding.check, finding.detail)
    Console().print(table)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("export", "Write the shortened model as a plain Hugging Face directory, proven equal.")
    add_options(parser)
    add = parser.add_argument
    add("--checkpoint", metavar="PATH", help="recovered weights; default: the parent's own")
    add("--data", metavar="TEXT", help="what the model was trained on, for the card")
    return parser.parse_args(argv)


def add_options(parser: Parser) -> None:
    """Add the options that all commands that end in an export have in common."""
    add = parser.add_argument
    add("--mask", required=True, metavar="FILE", help="mask.json of a search")
    add("--out", required=True, metavar="DIR", help="directory to create")
    add("--model", metavar="NAME", help="parent, if not under the name the mask gives")
    add("--any-parent", action="store_true", help="cut a --model that the mask was not made for")
    add("--dtype", choices=DTYPES, help="type of the stored weights (default: the parent's)")
    add("--force", action="store_true", help="replace --out if it is a model")
    add("--license", metavar="ID", help="licence for the card (default: the parent's)")
    add("--device", default="cpu", help="where the proof computes (default: cpu, where bits must agree)")
    length, types = Range(int, SHORTEST, MOST), ("float32", "stored")
    add(
        "--proof-tokens",
        type=length,
        metavar="T",
        help=f"length of the proof's sequences, {SHORTEST} or more (default: past the window)",
    )
    add(
        "--proof-dtype",
        choices=types,
        default="float32",
        help="type the proof computes in (default: float32; stored needs half the memory)",
    )
    former = partial(add, default=argparse.SUPPRESS, help=argparse.SUPPRESS)  # spellings of earlier versions
    former("--gate-tokens", dest="proof_tokens", type=length)
    former("--gate-dtype", dest="proof_dtype", choices=types)
