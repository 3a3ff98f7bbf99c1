"""Repair the cut model without training, and export it: ``python -m src.cli patch``.

``python -m src.cli patch --mask logs/run/mask.json --data rows.jsonl --out DIRECTORY``

The calibration rows decide a few weights (:mod:`src.repair.linear_patch`, :mod:`src.repair.mask_tuning`). The
export does the rest, as without a repair: it writes under a temporary name, proves, then renames.
"""

from __future__ import annotations

import argparse
from typing import get_args

from src.command import Parser
from src.data.options import add_columns, read_columns
from src.export.cuts import public_name
from src.export.verb import add_options, export, tell
from src.mask import Mask
from src.ranges import above_zero, from_zero, natural, positive
from src.repair.base import CutRepair
from src.repair.linear_patch import Goal, LinearPatch
from src.repair.mask_tuning import MaskTuning

METHODS: dict[str, type[CutRepair]] = {"linear_patch": LinearPatch, "mask_tuning": MaskTuning}
COMMON = ("rows", "split", "max_length", "batch_size", "ridge", "device")
LINEAR_PATCH = ("goal", "distill_steps", "lr")
"""Settings that only the first method has."""


def main(argv: list[str]) -> None:
    """Repair a cut model, export it and print its proof."""
    args = _parse(argv)
    mask = Mask.load(args.mask)
    given = {key: getattr(args, key) for key in (*COMMON, *LINEAR_PATCH)}
    given = {key: value for key, value in given.items() if value is not None}
    repair = METHODS[args.method](args.calibration, columns=read_columns(args), **given)
    repair.refuse(mask)
    findings = export(mask, args, repair)
    print(repair)
    tell(mask, args.out, findings)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("patch", "Export the cut model with the residual stream repaired behind each gap.")
    add_options(parser)
    add = parser.add_argument
    add("--data", dest="calibration", required=True, metavar="FILE", help="calibration rows, or a Hub id")
    add(
        "--method",
        choices=[*METHODS],
        default="linear_patch",
        help="repair the stream behind each gap (default), or tune the scales of all that is kept",
    )
    add(
        "--goal",
        choices=get_args(Goal),
        help="fit the stream behind a gap to the parent's (default), or to LinearPatch's h P, rotated or not",
    )
    add("--rows", type=positive, metavar="N", help="rows, at most (default: 256; mask_tuning: 64)")
    add_columns(parser)
    add("--max-length", type=positive, default=1024, metavar="T", help="tokens of a row (default: 1024)")
    add("--batch-size", type=positive, default=8, metavar="B", help="rows at once (default: 8)")
    add("--ridge", type=from_zero, metavar="X", default=0.1, help="pull to the old weights (default: 0.1)")
    add("--distill-steps", type=natural, metavar="N", help="distil P before it is folded")
    add("--lr", type=above_zero, metavar="X", help="of that distillation (default: 1e-4)")
    args = parser.parse_args(argv)
    if strange := [
        key for key in LINEAR_PATCH if METHODS[args.method] is not LinearPatch and vars(args)[key]
    ]:
        parser.error(
            f"--{strange[0].replace('_', '-')}: --method {args.method} has no such setting. Leave it out."
        )
    args.checkpoint, args.data = None, f"calibration rows of {public_name(args.calibration)}"
    return args
