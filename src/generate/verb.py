"""Let a model write rows of text: ``python -m src.cli generate --model M --prompts FILE --out own.jsonl``.

A student learns most from text as its teacher writes it. Without prompts, an instruction-tuned model asks
the questions too: ``--questions 1000 --temperature 0.7 --out questions.jsonl``, which are prompts then. Any
model writes plain texts from their first token on: ``--documents 1000 --temperature 1``.
The rows have the form in which corpora are read (docs/data.md), so that ``own.jsonl`` can be trained on as
it is. Each batch is kept as it is written; the same command after an interruption goes on behind the last
whole one, and writes what it would have written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from src.command import Parser, load, new_file, provenance
from src.data.content import fingerprint
from src.data.formats import Row
from src.data.judging import read_rows
from src.data.options import COLUMN_OPTIONS, add_columns, read_columns
from src.data.sources import Source
from src.errors import ConfigError
from src.evaluate.generate import new_tokens, stop_tokens
from src.files import discard, read_json, write_json, write_text
from src.generate.prompts import Prompt, Prompts
from src.models.fingerprint import identity
from src.models.loading import load_config, load_tokenizer, longest_row
from src.ranges import SEED, Range, positive
from src.training.progress import track

COLDEST = 1e-3
"""Least temperature that is drawn at; logits divided by much less than that would overflow float32."""
UNPROMPTED = {"questions": 0.7, "documents": 1}
"""What a model writes without prompts, a method of :class:`Prompts` each, and a temperature to draw it at."""
START = 16
"""Tokens given of a plain text, where the command does not say how many."""
OF_PROMPTS = ("limit", "start", *COLUMN_OPTIONS)
"""Options that say what is read of ``--prompts``."""
Written = dict[str, Any]
"""``row``, the row of the corpus; ``tokens``, how many are new; ``finished``, whether the model ended it."""


def main(argv: list[str]) -> None:
    """Write the rows and their record.

    Raises:
        ConfigError: the prompts cannot be read, or what lies at ``--out`` was made with other settings.
    """
    args = _parse(argv)
    out = Path(args.out)
    parts, record = out.with_name(f"{out.name}.parts"), out.with_name(f"{out.name}.record.json")
    settings = _settings(args)
    if _finished(out, record, settings, args.force):
        print(f"{out}: written already by this command")
        return
    tokenizer = load_tokenizer(args.model)
    prompts = _prompts(args, tokenizer)
    places = longest_row(args.model) or sys.maxsize
    new_tokens([prompt.ids for prompt in prompts], places, None, args.max_new_tokens)  # refuses the longest
    model = load(args.model, args)
    stop = stop_tokens(model, tokenizer)
    model.generation_config = GenerationConfig()  # the checkpoint's penalties and beams would join ours
    _go_on(parts, settings)
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n].ids))
    batches = [order[at : at + args.batch_size] for at in range(0, len(order), args.batch_size)]
    done, seconds = dict[int, Written](), 0.0
    for number, batch in enumerate(track(batches, "batches written")):
        part = parts / f"batch-{number:06d}.json"
        if not part.exists():
            torch.manual_seed(_seed(args, number))
            began = time.monotonic()
            rows = written(model, stop, [prompts[n] for n in batch], places, args)
            write_json(part, {"rows": rows, "seconds": time.monotonic() - began})
        stored = read_json(part)
        done |= zip(batch, stored["rows"], strict=True)
        seconds += stored["seconds"]  # a process before this one may have written it
    asked = [done[n] for n in sorted(done) if args.prompts or _says(done[n]["row"])]
    unfinished = sum(not each["finished"] for each in asked)
    kept = [each for each in asked if each["finished"] or not args.finished]
    if not kept:
        raise ConfigError(
            f"--finished: none of the {len(done)} rows ended within {args.max_new_tokens} tokens. Raise "
            f"--max-new-tokens, or leave --finished out."
            if asked
            else f"--{_free(args)}: the model says nothing in {len(done)} tries. Give --prompts."
        )
    write_text(out, "".join(json.dumps(each["row"], ensure_ascii=False) + "\n" for each in kept))
    figures = {
        "rows": len(kept),
        "tokens": sum(each["tokens"] for each in kept),
        "unfinished": unfinished,
        "seconds": seconds,
    }
    write_json(record, settings | figures | provenance("generate", argv, model))
    discard(parts)
    print("{rows} rows, {tokens:,} tokens, {unfinished} rows not finished".format(**figures), f"-> {out}")


def _seed(args: argparse.Namespace, number: int) -> int:
    """The seed of a batch in every run; no other seed, number or part of the command gives it."""
    key = json.dumps([args.seed, args.part, number]).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "big")


def _says(row: Row) -> str:
    """What the model says of its own in a row: a text, or a question."""
    return str(row["text"] if "text" in row else row["messages"][0]["content"]).strip()


def _free(args: argparse.Namespace) -> str:
    """The option by which the model writes without prompts; empty with prompts."""
    return next((name for name in UNPROMPTED if getattr(args, name)), "")


def _prompts(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """What the model goes on from: rows of the corpus, or the place where a user or a text begins.

    Raises:
        ConfigError: there is no row for this part, or what is free would be all the same.
    """
    (first, of), free, config = args.part, _free(args), load_config(args.model).get_text_config()
    begins = getattr(config, "bos_token_id", None)
    read = Prompts(tokenizer, read_columns(args), args.start, begins)
    if free and not args.temperature:
        raise ConfigError(
            f"--{free}: all would be the same at --temperature 0. Add --temperature {UNPROMPTED[free]}."
        )
    prompts: list[Prompt]
    if free:
        number = getattr(args, free)
        given, prompts = f"--{free}:", getattr(read, free)(number)[first::of]
    else:
        rows = read_rows(args.prompts, args.limit, args.split)
        given, number, prompts = f"--prompts: '{args.prompts}' has", len(rows), read(rows[first::of])
    if not prompts:
        raise ConfigError(f"{given} {number or 'no'} rows, none for part {first}/{of}.")
    return prompts


@torch.inference_mode()
def written(
    model: PreTrainedModel,
    stop: frozenset[int],
    prompts: list[Prompt],
    places: int,
    args: argparse.Namespace,
) -> list[Written]:
    """Continue some prompts as one batch, padded on the left.

    Args:
        model: the model that writes, without sampling settings of its own.
        stop: tokens that end a text.
        prompts: the prompts.
        places: tokens that prompt and continuation may have together.
        args: options of the command: how many tokens are written, and how they are drawn.

    Returns:
        For each prompt a dict (:data:`Written`) of its row, number of new tokens, and whether it is finished.
    """
    longest = max(len(prompt.ids) for prompt in prompts)
    most = new_tokens([prompt.ids for prompt in prompts], places, None, args.max_new_tokens)
    padding = [longest - len(prompt.ids) for prompt in prompts]
    ids_BT = torch.tensor([[0] * n + prompt.ids for n, prompt in zip(padding, prompts, strict=True)])
    mask_BT = torch.tensor([[0] * n + [1] * (longest - n) for n in padding])
    chance = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=most, eos_token_id=sorted(stop), pad_token_id=min(stop, default=0),
        **(chance if args.temperature else {"do_sample": False}),
    )  # fmt: skip
    continued = cast(Any, model).generate  # the class that has it is not a base of all models
    out_BT = continued(
        ids_BT.to(model.device), attention_mask=mask_BT.to(model.device), generation_config=config
    )
    found = list[Written]()
    for prompt, new in zip(prompts, out_BT[:, longest:].tolist(), strict=True):
        end = next((at for at, token in enumerate(new) if token in stop), len(new))
        found.append({"row": prompt.row(new[:end]), "tokens": end, "finished": end < len(new)})
    return found


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the rows follow from: model and prompts by their content, and the options."""
    plain = ("out", "force", "device", "model", "prompts")
    options = {key: value for key, value in vars(args).items() if key not in plain}
    for name in UNPROMPTED:
        if not options[name]:
            del options[name]  # rows that were begun before there was this option
    if args.temperature:
        options["drawn"] = "by batch"  # rows that were begun with seeds of another rule
    prompts = fingerprint(Source(args.prompts, split=args.split)) if args.prompts else None
    model = identity(args.model)
    return {
        "model": model or args.model,
        "prompts": prompts or args.prompts,
        "options": json.loads(json.dumps(options)),
    }


def _finished(out: Path, record: Path, settings: dict[str, Any], force: bool) -> bool:
    """Return whether the rows are there, by these settings.

    Raises:
        ConfigError: a file is there that is not replaced without ``--force``.
    """
    if not out.exists() or force:
        return False
    if record.exists() and settings.items() <= read_json(record).items():
        return True
    raise ConfigError(f"--out: '{out}' is there, made otherwise. Name another file, or add --force.")


def _go_on(parts: Path, settings: dict[str, Any]) -> None:
    """Begin the directory of the parts, or go on in it.

    Raises:
        ConfigError: it was begun with other settings.
    """
    kept = parts / "settings.json"
    if not kept.exists():
        write_json(kept, settings)
    elif (was := read_json(kept)) != settings:
        other = ", ".join(key for key in settings if was.get(key) != settings[key])
        raise ConfigError(
            f"--out: '{parts}' was begun with other settings ({other}). Remove it, or name another file."
        )


def _part(text: str) -> tuple[int, int]:
    """Return a part and the number of parts, as ``type`` of argparse.

    Raises:
        ArgumentTypeError: it is no such part.
    """
    first, slash, of = text.partition("/")
    if not (slash and first.isdecimal() and of.isdecimal() and int(first) < int(of)):
        raise argparse.ArgumentTypeError(f"'{text}' given; accepted: K/N with K from 0 to N - 1, such as 0/8")
    return int(first), int(of)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("generate", "Let a model write the answers to prompts, as rows to train on.")
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="who writes: Hub id or directory")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument(
        "--prompts", metavar="FILE", help="chats, questions or texts: JSONL, Parquet, text or a Hub id"
    )
    given.add_argument(
        "--questions",
        type=positive,
        metavar="N",
        help="instead of prompts: N questions that the model asks itself",
    )
    given.add_argument(
        "--documents",
        type=positive,
        metavar="N",
        help="instead of prompts: N texts that the model writes from the first token on",
    )
    add("--out", required=True, type=new_file, metavar="FILE", help="the rows, as JSONL")
    add_columns(parser)
    add("--limit", type=positive, metavar="N", help="the first N rows only")
    add("--part", type=_part, default=(0, 1), metavar="K/N", help="of N parts of these, part K, from 0")
    add("--finished", action="store_true", help="leave out rows that the model did not end")
    add("--start", type=positive, metavar="T", help=f"tokens given of a plain text (default: {START})")
    add("--max-new-tokens", type=positive, default=512, metavar="T", help="of a row (default: 512)")
    add("--batch-size", type=positive, default=32, metavar="B", help="rows at once (default: 32)")
    add(
        "--temperature",
        type=Range(float, COLDEST, 100, also=(0,)),
        default=0.0,
        help="of sampling (default: 0, the likeliest token)",
    )
    add(
        "--top-p",
        type=Range(float, 0, 1, "low"),
        default=1.0,
        help="smallest set of tokens with that probability (default: 1)",
    )
    add("--seed", type=Range(int, 0, SEED), default=0, help="of sampling (default: 0)")
    add("--force", action="store_true", help="replace a file that is there")
    parser.add_model_options()
    args = parser.parse_args(argv)
    if (free := _free(args)) and (unread := [f"--{name}" for name in OF_PROMPTS if getattr(args, name)]):
        raise ConfigError(f"--{free}: there are no rows to read; leave out {', '.join(unread)}.")
    args.start = args.start or START
    return args
