"""Export the cut model as a plain Hugging Face directory, proven before it gets its name.

``python -m src.cli export --mask logs/run/mask.json [--checkpoint logs/run/last.ckpt] --out DIRECTORY``

Everything is written beside ``--out`` under a temporary name. In memory the parent with hard gates must equal
the cut model. Then a fresh process that knows only the directory must compute from it what the model in
memory computes (:mod:`src.export.fresh`). Only then is the directory renamed. A fault, a full disk or a kill
leaves nothing under the final name, and an existing directory stays as it was unless ``--force`` is given.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from src.command import Parser
from src.errors import ConfigError
from src.export import clusters, push
from src.export.observe import LOGITS, Finding
from src.export.parent import true_parent
from src.export.proof import stored_as_parent
from src.export.write import Parent, check_out, write
from src.mask import Mask
from src.models.cut import cut
from src.models.loading import load_tokenizer
from src.models.two_four import crowded, linear_maps
from src.ranges import MOST, Range, positive
from src.repair.base import CutRepair
from src.training import checkpoints
from src.training.scopes import load_student

SHORTEST = 8
"""Fewest tokens of a sequence of the proof: padding covers some, and the rest must still be a sequence."""
DTYPES = ("float32", "bfloat16", "float16")


def export(mask: Mask, args: argparse.Namespace, repair: CutRepair | None = None) -> list[Finding]:
    """Export the cut model, by the options ``args``, after a repair if given; return the proof's findings.

    Raises:
        ConfigError: an option is at fault, the family cannot express the mask, or a check fails.
    """
    out, name = Path(args.out), args.model or mask.model
    check_out(out, args.force, name)
    parent = Parent.of(mask, name)
    model = parent.load(args.dtype or "auto", args)
    record = checkpoints.record(args.checkpoint) if args.checkpoint else None
    made_for, mask = mask.model, true_parent(mask, name, record, args.any_parent)
    student = load_student(model, mask, args.checkpoint) if args.checkpoint else cut(model, mask)
    sparse = two_of_four(student) if record and "sparse" in record else []
    student, rounding = stored_as_parent(student, model, mask, args.proof_tokens)
    folds = repair and repair(student, model, mask, load_tokenizer(name, parent.revision))
    return write(
        out,
        parent,
        model,
        student,
        mask,
        args,
        changed=bool(args.checkpoint or folds),
        known=[*sparse, *rounding],
        recovery=record and record["recovery"],
        made_for=made_for,
        data=args.data if folds or repair is None else None,  # a repair without a gap used no rows
        repair=str(repair) if folds else None,
    )


def two_of_four(student: PreTrainedModel) -> list[Finding]:
    """Return the finding that the linear maps of a recovered model are 2:4 sparse.

    Raises:
        ConfigError: they are not, because the run that was to make them so has not ended.
    """
    if left := crowded(student):
        raise ConfigError(
            f"checkpoint: two of each four weights were to become zero, and {left:,} fours have more than "
            f"two others: its run has not ended. Resume it, and give its last checkpoint."
        )
    maps = len(linear_maps(student))
    return [
        Finding(
            "two of four", True, f"in {maps} linear maps no four weights have more than two nonzeros", True
        )
    ]


def main(argv: list[str]) -> None:
    """Export a cut model, print its proof, and send it to the Hub if asked."""
    args = _parse(argv)
    sent, mask = push.wanted(args), Mask.load(args.mask)
    if args.clusters is not None:
        clusters.refuse(args)
        for number, (one, findings) in enumerate(clusters.export_clusters(mask, args)):
            tell(one, Path(args.out, str(number)), findings)
        return
    if sent:
        push.check(args.push, args.force, args.report)
    tell(mask, args.out, export(mask, args))
    if sent:
        push.push(Path(args.out), args.push, args.public, args.report)


def tell(mask: Mask, out: str | Path, findings: list[Finding]) -> None:
    """Print the mask of an export, that its proof held, where the checks are listed, and what was noted."""
    *_, logits = (finding.detail for finding in findings if finding.check == LOGITS)
    print(f"{out}: {mask}")
    print(f"proven in a fresh process, logits {logits}; all {len(findings)} checks: {out}/README.md")
    for finding in findings:
        if finding.noted:
            print(f"note: {finding.check}: {finding.detail}")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("export", "Write the shortened model as a plain Hugging Face directory, proven equal.")
    add_options(parser)
    add = parser.add_argument
    add("--checkpoint", metavar="PATH", help="recovered weights; default: the parent's own")
    add("--data", metavar="TEXT", help="what the model was trained on, for the card")
    add("--push", metavar="USER/NAME", help="send the export to the Hugging Face Hub, once it is proven")
    push.add_options(parser)
    add("--clusters", type=positive, metavar="K", help="of a search of prompts: K checkpoints and a router")
    return parser.parse_args(argv)


def add_options(parser: Parser) -> None:
    """Add the options that commands have in common that cut a parent and end in an export."""
    add = parser.add_argument
    add("--mask", required=True, metavar="FILE", help="mask.json of a search")
    add("--model", metavar="NAME", help="parent, if not under the name the mask gives")
    add("--any-parent", action="store_true", help="cut a --model that the mask was not made for")
    add_written(parser)


def add_written(parser: Parser) -> None:
    """Add the options that all commands that end in an export have in common."""
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="directory to create")
    add("--dtype", choices=DTYPES, help="type of the stored weights (default: the parent's)")
    add(
        "--force",
        action="store_true",
        help="replace --out if it is a model; with --push, add to a repository that exists",
    )
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
