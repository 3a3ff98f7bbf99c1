"""Print a few rows of a corpus as a model will see them: ``python -m src.cli preview --config FILE``.

Supervised text stands between ``{+`` and ``+}`` (in green on a terminal), the rest is context; so a person
sees prompts, templates, special tokens and document boundaries before a single step is trained.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path

import jsonargparse
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from src.command import Parser
from src.data import Corpus
from src.data.encode import IGNORE
from src.data.loader import Loader
from src.errors import ConfigError
from src.mask import Mask
from src.ranges import positive
from src.training.settings_file import read_settings

Marks = tuple[str, str]

BRACES: Marks = ("{+", "+}")
GREEN: Marks = ("\033[32m", "\033[0m")


def main(argv: list[str]) -> None:
    """Print rows of the corpus of an experiment.

    Raises:
        ConfigError: the experiment has no corpus, or a row of it is at fault.
    """
    parser = Parser("preview", "Print a few rows as a model sees them, with what is supervised.")
    parser.add_argument("--config", type=Path, required=True, help="an experiment; its data is read")
    parser.add_argument("--rows", type=positive, default=3, metavar="N", help="rows to print (default: 3)")
    parser.add_argument("--split", choices=("train", "validation"), default="train")
    parser.epilog = "--data.KEY VALUE, --model.init_args.model and .mask change the experiment, as in fit."
    args, changes = parser.parse_known_args(argv)
    corpus = read_corpus(args.config, changes)
    marks = GREEN if sys.stdout.isatty() else BRACES
    loader = corpus.loader(args.split, shuffle=args.split == "train")
    for number, (ids, labels) in enumerate(islice(documents(loader), args.rows), start=1):
        supervised = sum(label != IGNORE for label in labels)
        print(f"--- row {number}: {len(ids)} tokens, {supervised} supervised")
        print(marked(corpus.tokenizer, ids, labels, marks))
    for fate in sorted(loader.statistics.fates()):
        print(f"--- {fate}")


def read_corpus(config: Path, changes: list[str]) -> Corpus:
    """Build the corpus of an experiment.

    Args:
        config: the experiment's file.
        changes: command-line options that change it: ``--data.KEY VALUE`` and, to find the tokenizer,
            ``--model.init_args.model`` and ``--model.init_args.mask``.

    Raises:
        ConfigError: the file cannot be read, or its data section is no corpus.
    """
    try:
        experiment = read_settings(str(config))
        data, model = experiment["data"], experiment.get("model", {}).get("init_args", {})
        own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        for key in ("model", "mask"):
            own.add_argument(f"--model.init_args.{key}", dest=key, default=model.get(key))
        named, changes = own.parse_known_args(changes)
        data.setdefault("init_args", {}).setdefault("tokenizer", _parent(named.model, named.mask))
    except (FileNotFoundError, KeyError, AttributeError, TypeError) as e:
        raise ConfigError(f"--config: '{config}' gives no data section ({type(e).__name__}: {e}).") from e
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Corpus, "data")
    try:
        section = parser.parse_args(changes, namespace=parser.parse_object({"data": data}))
    except argparse.ArgumentError as e:
        raise ConfigError(f"--config: the data of '{config}': {e}") from e
    corpus: Corpus = parser.instantiate_classes(section).data
    return corpus


def _parent(model: str | None, mask: str | None) -> str | None:
    """Return the model whose tokenizer is used, as ``fit`` finds it: named, or by the mask of a recovery."""
    return Mask.load(mask).model if model is None and mask and Path(mask).is_file() else model


def documents(loader: Loader) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the token ids and the labels of each document, without padding and one by one if packed."""
    for batch in loader:
        loader.handed()
        for row in range(len(batch["input_ids"])):
            ids, labels = batch["input_ids"][row], batch["labels"][row]
            for begin, end in _bounds({key: value[row] for key, value in batch.items()}):
                yield ids[begin:end].tolist(), labels[begin:end].tolist()


def _bounds(row: dict[str, Tensor]) -> list[tuple[int, int]]:
    if "attention_mask" in row:
        return [(0, int(row["attention_mask"].sum()))]
    starts = (row["position_ids"] == 0).nonzero().flatten().tolist()
    bounds = zip(starts, [*starts[1:], len(row["position_ids"])], strict=True)
    return [(begin, end) for begin, end in bounds if end - begin > 1]  # one token alone is padding


def marked(tokenizer: PreTrainedTokenizerBase, ids: list[int], labels: list[int], marks: Marks) -> str:
    """Return the text of a document, its supervised runs between ``marks``."""
    text = ""
    runs = groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORE)
    for supervised, run in runs:
        piece = str(tokenizer.decode([token for token, _ in run]))
        text += marks[0] + piece + marks[1] if supervised else piece
    return text
