"""The embedded task: multi-step arithmetic word problems with worked solutions.

GSM8K in miniature, in GSM8K's own format: a row is ``{"question", "answer"}`` and the answer ends in
``#### <number>``. Every problem chains operations on one running total, so each step of the solution
depends on the one before it, and one slip makes the final answer wrong. The embedded teacher was trained on
two to four operations; more can be asked for, of which it gets few right, so that a judge does not saturate.

The split of a problem is a function of its text (a hash), so train, validation and test are disjoint by
construction, whatever the seeds and sizes; :func:`write_splits` checks it all the same.

Run ``python -m src.data.arithmetic --help`` to write the JSONL files and the tokenizer.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from src.errors import ConfigError
from src.files import write_text
from src.ranges import natural

NAMES = ("Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Iris", "Jon", "Kim", "Leo")
ITEMS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps", "stones", "tickets")
GAIN = ("{name} buys {n} more.", "{name} finds {n} more.", "A friend gives {name} {n} more.")
LOSS = ("{name} loses {n}.", "{name} sells {n}.", "{name} gives away {n}.")
SPLITS = ("train", "validation", "test")
MAX_TOTAL = 200
"""No running total reaches this number."""
STEPS = (2, 4)
"""Least and most operations of the problems that the embedded teacher was trained on."""

_PIECE = r" ?[A-Za-z]+| ?#+| ?[0-9]| ?[^A-Za-z0-9\s]|\n| "


def problem(rng: random.Random, steps: tuple[int, int] = STEPS) -> dict[str, str]:
    """Draw one problem: ``question``, and the worked ``answer`` that ends in ``#### <number>``.

    Args:
        rng: source of chance.
        steps: least and most operations.
    """
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    total = rng.randint(3, 60)
    story, work = [f"{name} has {total} {item}."], []
    for _ in range(rng.randint(*steps)):
        sentence, lines, total = _step(rng, total, name, item)
        story.append(sentence)
        work += lines
    story.append(f"How many {item} does {name} have now?")
    return {"question": " ".join(story), "answer": " ".join([*work, f"#### {total}"])}


def _step(rng: random.Random, total: int, name: str, item: str) -> tuple[str, list[str], int]:
    """Return one operation on the running total: its sentence, its worked lines and the new total."""
    kind = rng.choice(("gain", "loss", "times", "boxes"))
    if kind == "times" and total * 3 < MAX_TOTAL:
        factor, verb = rng.choice(((2, "double"), (3, "triple")))
        return f"The {item} {verb}.", [f"{total} * {factor} = {total * factor}."], total * factor
    if kind == "boxes" and total + 81 < MAX_TOTAL:
        boxes, each = rng.randint(2, 9), rng.randint(2, 9)
        product = boxes * each
        lines = [f"{boxes} * {each} = {product}.", f"{total} + {product} = {total + product}."]
        return f"{name} gets {boxes} boxes of {each}.", lines, total + product
    if total < 3 or (kind == "gain" and total + 60 < MAX_TOTAL):
        n = rng.randint(2, 60)
        return rng.choice(GAIN).format(name=name, n=n), [f"{total} + {n} = {total + n}."], total + n
    n = rng.randint(1, min(60, total - 1))
    return rng.choice(LOSS).format(name=name, n=n), [f"{total} - {n} = {total - n}."], total - n


def split_of(row: dict[str, str]) -> str:
    """Return the split a problem belongs to, from a hash of its question: 90 % train, 5 % and 5 %."""
    bucket = zlib.crc32(row["question"].encode()) % 20
    return "validation" if bucket == 0 else "test" if bucket == 1 else "train"


def problems(split: str, count: int, seed: int, steps: tuple[int, int] = STEPS) -> Iterator[dict[str, str]]:
    """Yield ``count`` distinct problems of ``split``; the same seed and steps give the same problems."""
    rng, seen = random.Random(seed), set[str]()
    while len(seen) < count:
        row = problem(rng, steps)
        if split_of(row) == split and row["question"] not in seen:
            seen.add(row["question"])
            yield row


def final_answer(text: str) -> str | None:
    """Return the number after the last ``####``, without thousands separators, or None."""
    numbers = re.findall(r"####\s*(-?[0-9][0-9,]*(?:\.[0-9]+)?)", text)
    return numbers[-1].replace(",", "") if numbers else None


@cache
def _pieces() -> tuple[str, ...]:
    """Return the tokens of the task's texts, sorted; they are read from many problems, once in a process."""
    rng = random.Random(0)
    pieces = {d for digit in "0123456789" for d in (digit, " " + digit)} | {" ", "\n"}
    for _ in range(20_000):
        row = problem(rng)
        pieces.update(re.findall(_PIECE, row["question"] + "\n" + row["answer"]))
    return tuple(sorted(pieces))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a lossless word-level fast tokenizer over the task's closed vocabulary.

    Each digit is a token of its own. A token carries the space before it, as in byte-level BPE, so that
    decoding restores the text.
    """
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *_pieces()])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECE), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def write_splits(out: Path, sizes: dict[str, int], seed: int = 0, steps: tuple[int, int] = STEPS) -> None:
    """Write ``<split>.jsonl`` for each split into ``out``; each file appears whole or not at all.

    Args:
        out: directory of the files.
        sizes: number of problems of each split.
        seed: seed of the draw; each split adds its place in ``SPLITS``.
        steps: least and most operations of a problem.

    Raises:
        AssertionError: two splits share a question, which the construction rules out.
    """
    questions: dict[str, set[str]] = {}
    for split, size in sizes.items():
        rows = list(problems(split, size, seed + SPLITS.index(split), steps))
        questions[split] = {row["question"] for row in rows}
        write_text(out / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for split, own in questions.items():
        for other, theirs in questions.items():
            assert split == other or not own & theirs, f"{split} and {other} share a question"


def main() -> None:
    """Write the three JSONL files and, if asked, the tokenizer, as the command line says."""
    import argparse

    parser = argparse.ArgumentParser(description="Write the arithmetic corpus as JSONL.")
    parser.add_argument("--out", type=Path, required=True, help="directory for <split>.jsonl")
    parser.add_argument("--train", type=natural, default=60_000, help="training problems")
    parser.add_argument("--validation", type=natural, default=1_000, help="validation problems")
    parser.add_argument("--test", type=natural, default=1_000, help="test problems")
    parser.add_argument("--tokenizer", type=Path, help="directory for the tokenizer, if wanted")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw")
    told = "least and most operations of a problem (default: those that the embedded teacher knows)"
    parser.add_argument("--steps", type=int, nargs=2, default=STEPS, metavar=("LEAST", "MOST"), help=told)
    args = parser.parse_args()
    if not 1 <= args.steps[0] <= args.steps[1]:
        parser.error(f"--steps: {args.steps} given; accepted: two whole numbers from 1, the second not less")
    sizes = {split: getattr(args, split) for split in SPLITS}
    try:
        write_splits(args.out, sizes, args.seed, tuple(args.steps))
    except ConfigError as e:
        parser.error(f"--out: {e}")
    if args.tokenizer:
        build_tokenizer().save_pretrained(args.tokenizer)
    print("problems:", ", ".join(f"{count:,} {split}" for split, count in sizes.items()), f"-> {args.out}")


if __name__ == "__main__":
    main()
