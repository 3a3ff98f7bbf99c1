"""Prune and merge the tokens of a small vision transformer: ``python -m src.cli vision --out vision.json``.

For each seed a classifier learns the digits of scikit-learn. Its tokens are scored on what it was trained on,
then pruned and merged in all blocks but the first. Beside it stands one that is compressed by random scores,
at the same thresholds. All three are then fine-tuned alike. The command runs on the CPU, in one process.
"""

from __future__ import annotations

import argparse
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import ViTForImageClassification

from src.command import Parser, new_file, provenance, rich_table, show
from src.errors import ConfigError
from src.files import write_json, write_text
from src.ranges import SEED, Range, natural, positive, share
from src.report.figures import svg
from src.vision.digits import COLUMNS, Digits, accuracy, classifier, digits, speed, train
from src.vision.picture import picture
from src.vision.tokens import compress, importance, merging, parts

FIRST, TIMED = 1, 256
"""Number of the first block that is compressed, and images in the batch that is timed."""
SHOWN = {
    "tokens": ("tokens of a block", 1, "{:.1f}"),
    "accuracy": ("accuracy, %", 100, "{:.1f}"),
    "tuned": ("fine-tuned, %", 100, "{:.1f}"),
    "ms": (f"ms of processor time, {TIMED} images", 1, "{:.1f}"),
    "speedup": ("times as fast", 1, "{:.2f}"),
    "ideal": ("by operations", 1, "{:.2f}"),
}
"""Title, scale and form of each figure in the table."""
HEAD = " | ".join(["model", *(title for title, _, _ in SHOWN.values())])


def main(argv: list[str]) -> None:
    """Measure all seeds, print the table, write figures and picture.

    Raises:
        ConfigError: scikit-learn is missing, or the thresholds overlap.
    """
    args = _parse(argv)
    if args.prune + args.keep > 1:
        raise ConfigError(f"--prune {args.prune} and --keep {args.keep} given; accepted: at most 1 together.")
    data, held_out = digits()
    models = [train(classifier(seed), data, args.epochs, seed) for seed in args.seeds]
    scores = [importance(model, data.batches())[FIRST:] for model in models]
    runs = [measured(args, *each, data, held_out) for each in zip(args.seeds, models, scores, strict=True)]
    settings = {key: getattr(args, key) for key in ("prune", "keep", "epochs", "tuning", "seeds", "repeats")}
    rows = [{"model": name, **{key: [run[name][key] for run in runs] for key in SHOWN}} for name in runs[0]]
    found = {"rows": rows, **settings, **provenance("vision", argv, models[0])}
    show(rich_table([HEAD.split(" | "), *cells(found)]))
    if args.out:
        write_json(args.out, found)
    if args.figure:
        part_LP = parts(scores[0], args.prune, args.keep)
        write_text(args.figure, svg(picture(held_out.images[0, 0], part_LP, FIRST, COLUMNS)))


def measured(
    args: argparse.Namespace,
    seed: int,
    model: ViTForImageClassification,
    score_LP: Tensor,
    data: Digits,
    held_out: Digits,
) -> dict[str, dict[str, float]]:
    """Return the figures of a trained classifier and of what it is compressed to, by name.

    Args:
        args: the options.
        seed: seed of the random scores and of the order of fine-tuning.
        model: the classifier, from which all are distilled.
        score_LP: scores in the blocks to compress.
        data: what fine-tuning reads.
        held_out: what is judged by and timed on.
    """
    noise_LP = torch.rand(score_LP.shape, generator=torch.Generator().manual_seed(seed))
    merges = {"whole": dict[int, Tensor]()}
    for name, each_LP in (("pruned and merged", score_LP), ("the same, random scores", noise_LP)):
        pairs = zip(parts(each_LP, args.prune, args.keep), each_LP, strict=True)
        merges[name] = {FIRST + at: merging(*pair, COLUMNS) for at, pair in enumerate(pairs)}
    models = [compress(deepcopy(model), own) for own in merges.values()]
    ms, work = speed(models, held_out.images[:TIMED], args.repeats)
    figures = dict[str, dict[str, float]]()
    for at, (name, own) in enumerate(merges.items()):
        counts = [len(own.get(block, range(1 + COLUMNS**2))) for block in range(FIRST + len(score_LP))]
        figures[name] = {
            "tokens": sum(counts) / len(counts),
            "accuracy": accuracy(models[at], held_out),
            "tuned": accuracy(train(models[at], data, args.tuning, seed, teacher=model), held_out),
            "ms": float(ms[at].median()),
            "speedup": float((ms[0] / ms[at]).median()),
            "ideal": work[0] / work[at],
        }
    return figures


def cells(found: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the table of results: of each figure the mean over seeds, and that of each seed."""
    rows = []
    for row in found["rows"]:
        told = [row["model"]]
        for key, (_, scale, form) in SHOWN.items():
            values = [form.format(scale * value) for value in row[key]]
            each = f" ({', '.join(values)})" if len({*values}) > 1 else ""
            told.append(form.format(scale * sum(row[key]) / len(row[key])) + each)
        rows.append(told)
    return rows


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("vision", "Prune and merge the tokens of a small vision transformer, on digits.")
    add = parser.add_argument
    add("--prune", type=share, default=0.1, metavar="X", help="share of tokens pruned (default: 0.1)")
    add("--keep", type=share, default=0.65, metavar="X", help="share that are centres (default: 0.65)")
    add("--epochs", type=positive, default=30, metavar="N", help="epochs of training (default: 30)")
    add("--tuning", type=natural, default=5, metavar="N", help="epochs of fine-tuning (default: 5)")
    seeds = Range(int, 0, SEED)
    add("--seeds", type=seeds, nargs="+", default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    add("--repeats", type=positive, default=30, metavar="R", help="turns of each model (default: 30)")
    add("--out", type=new_file, metavar="FILE", help="write the figures as JSON")
    add(
        "--figure",
        type=new_file,
        metavar="FILE",
        help="draw the tokens of a digit, as SVG, for the first seed",
    )
    return parser.parse_args(argv)
