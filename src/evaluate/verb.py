"""Judge models beside their teacher on the same rows: ``python -m src.cli evaluate``.

There are three kinds of figures:

* agreement with the teacher: exact KL over the whole vocabulary, and the share of tokens where both models
  rank the same token first;
* the language model: loss and perplexity;
* the task: exact match of the final answer after free greedy generation. Beside it stand the items that
  only one of model and teacher has right (flips), and the probability that chance alone divides them so
  unevenly (McNemar's exact test).

All figures are of the same rows. The number of rows read, and the reasons why some are not judged, are
printed with them.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from src.command import Parser, each_model, provenance, show
from src.data.arithmetic import final_answer
from src.data.columns import Columns
from src.data.formats import WHERE
from src.data.judging import Rows, batches, by_length, content, judged, prompt, read_rows
from src.data.options import COLUMN_OPTIONS, add_columns, read_columns
from src.errors import ConfigError
from src.evaluate import tasks
from src.evaluate.flips import flips
from src.evaluate.generate import greedy, new_tokens, stop_tokens
from src.evaluate.intervals import matched
from src.evaluate.routed import Turn, home, joined, turns
from src.evaluate.text import of_teacher, row_sums
from src.files import write_json
from src.models.loading import load_tokenizer, shared_positions
from src.ranges import natural, positive

# ---------------------------------------------------------------------- the task


QUESTIONS = Columns(prompt="question", answer="answer")


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    columns: Columns = QUESTIONS,
    max_new_tokens: int | None = None,
    batch_size: int = 128,
    positions: int = sys.maxsize,
) -> dict[str, Any]:
    """Measure the share of rows whose final answer (``#### n``) is right after free greedy generation.

    Args:
        model: the model to judge, in eval mode.
        tokenizer: its tokenizer.
        rows: prompts, and reference answers that end in ``#### n``.
        columns: names of the columns of prompt and reference.
        max_new_tokens: largest number of tokens of an answer; None is that of the longest reference plus 32.
        batch_size: prompts decoded together.
        positions: tokens that prompt and answer may have together.

    Returns:
        ``exact_match`` and its ``exact_match_interval`` of 95 %, ``correct`` (one bool a row), ``texts``
        (what was generated), ``new_tokens``, ``seconds``.

    Raises:
        ConfigError: a reference has no final answer, or there are too few positions.
    """
    began = time.monotonic()
    wanted = [_reference(row, columns) for row in rows]
    if None in wanted:
        at = wanted.index(None)
        raise ConfigError(
            f"--answer: that of {rows[at].get(WHERE, f'row {at + 1}')} does not end in '#### <number>', so "
            f"there is nothing to match. Add --no-exact-match."
        )
    encoded = judged(tokenizer, rows, columns).rows
    prompts = [prompt(row) for row in encoded]
    longest = max(len(row.ids) - len(start) for row, start in zip(encoded, prompts, strict=True))
    limit = new_tokens(prompts, positions, max_new_tokens, longest + 32)
    new = greedy(model, prompts, limit, stop_tokens(model, tokenizer), batch_size)
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    correct = [final_answer(text) == want for text, want in zip(texts, wanted, strict=True)]
    spent = {"new_tokens": sum(map(len, new)), "seconds": time.monotonic() - began}
    return matched(correct) | {"correct": correct, "texts": texts} | spent


# ---------------------------------------------------------------------- command


OF_ROWS = (*COLUMN_OPTIONS, "supervise", "max_length", "no_exact_match")
OF_TASKS = ("include_path", "data_dir", "num_fewshot", "chat")
"""Options that only held-out rows have (``OF_ROWS``), or only public tasks (``OF_TASKS``)."""


def main(argv: list[str]) -> None:
    """Judge the models, print the table, write the JSON.

    Raises:
        ConfigError: a model or the rows cannot be read, they do not fit each other, or no row can be judged.
    """
    args, began = _parse(argv), time.monotonic()
    if args.tasks is not None:
        tasks.main(args, argv)
        return
    homes = [*([args.teacher] if args.teacher else []), *map(home, args.model)]
    columns, tokenizer = read_columns(args), load_tokenizer(homes[0])
    positions = shared_positions(homes, args.max_length)
    read = read_rows(args.data, args.limit, args.split)
    encoded = judged(tokenizer, read, columns, args.supervise, min(args.max_length, positions))
    if not encoded.rows:
        raise ConfigError(f"--data: {encoded} of '{args.data}' can be judged. See --answer and --max-length.")
    rows = [read[number] for number in encoded.numbers]
    task = not args.no_exact_match and _matched(rows, columns)
    teacher, results, origin = None, list[dict[str, Any]](), dict[str, Any]()
    asked = turns(args.model, [prompt(row) for row in encoded.rows])
    args.model, everything = [turn.path for turn in asked], list(range(len(rows)))
    order = iter([*([Turn(args.teacher, args.teacher, everything)] if args.teacher else []), *asked])
    parts = list[tuple[Turn, dict[str, Any], Tensor]]()
    for result, model in each_model(args, tokenizer):  # in a zip, a model would outlive its turn
        turn = next(order)
        if task:
            new, size, own = args.max_new_tokens, args.batch_size, [rows[number] for number in turn.numbers]
            result |= exact_match(model, tokenizer, own, columns, new, size, positions)
        if args.teacher and teacher is None:
            teacher, first = model, (turn, result)  # its loss is measured beside the first model's
        else:
            mine = [encoded.rows[number] for number in turn.numbers]
            text = batches(mine, args.batch_size, tokenizer.pad_token_id or 0)
            as_given = torch.tensor(by_length(mine)).argsort()
            parts.append((turn, result, row_sums(model, teacher, text)[as_given]))
        if parts and turn.last:
            if teacher is not None and not results:
                sums_RC = of_teacher(torch.cat([sums for _, _, sums in parts]))
                results.append(joined([(*first, sums_RC)], False) | {"kl": 0.0, "agreement": 1.0})
            results.append(joined(parts, teacher is not None))
            parts = []
        origin = provenance("evaluate", argv, model)
        del model
    if task and teacher is not None:
        for result in results[1:]:
            if right := results[0]["exact_match"]:
                result["retention"] = result["exact_match"] / right
            result["flips"] = flips(result["correct"], results[0]["correct"])
    if not args.no_table:
        show(summary(results, f"{encoded} of {args.data}"))
    if args.out:
        origin["seconds"] = time.monotonic() - began
        prompts = [row[columns.of(row).prompt or ""] for row in rows[:3]] if task else []
        about = {**encoded.record, "content": content(rows), "prompts": prompts}
        write_json(args.out, _record(results, teacher is not None) | about | origin)


def _reference(row: dict[str, Any], columns: Columns) -> str | None:
    """Return the final answer of a row, if it has an answer that ends in one."""
    answer = row.get(columns.of({WHERE: "the row", **row}).answer or "")
    return final_answer(answer) if isinstance(answer, str) else None


def _matched(rows: Rows, columns: Columns) -> bool:
    """Return whether all rows have a final answer to match; tell it if only some have."""
    lacking = [row for row in rows if _reference(row, columns) is None]
    if lacking and len(lacking) < len(rows):
        told = f"{len(lacking)} of {len(rows)} rows have no answer that ends in '#### <number>'"
        print(f"note: no exact match: {told}; the first is {lacking[0][WHERE]}.", file=sys.stderr)
    return not lacking


def summary(results: list[dict[str, Any]], title: str) -> Table:
    """Return a table with a row for each of ``results``, the figures of a model; the teacher's come first.

    Behind exact match and perplexity stands their ratio to those of the first model.
    """
    table = Table(title=title)
    table.add_column("model")
    for heading in ["layers", "parameters", "exact match", "lost / gained", "KL", "agreement", "perplexity"]:
        table.add_column(heading, justify="right")
    for r in results:
        ratio = f" ({r['retention']:.1%})" if "retention" in r else ""
        table.add_row(
            r["path"],
            str(r["layers"]),
            f"{r['parameters']:,}",
            f"{r['exact_match']:.1%}{ratio}" if "exact_match" in r else "-",
            "{lost} / {gained} (p {p:.2g})".format(**r["flips"]) if "flips" in r else "-",
            f"{r['kl']:.4f}" if "kl" in r else "-",
            f"{r['agreement']:.1%}" if "agreement" in r else "-",
            f"{r['perplexity']:.3f} ({r['perplexity'] / results[0]['perplexity']:.2f}x)",
        )
    return table


def _record(results: list[dict[str, Any]], teacher: bool) -> dict[str, Any]:
    """Build the JSON: verdicts as a string of 0 and 1, and the first few texts."""
    for result in results:
        if "texts" in result:
            result["samples"] = result.pop("texts")[:3]
            result["correct"] = "".join("01"[ok] for ok in result["correct"])
    return {
        "teacher": results[0] if teacher else None,
        "models": results[1:] if teacher else results,
    }


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("evaluate", "Judge models beside their teacher, on held-out rows or on public tasks.")
    add = parser.add_argument
    add("--model", nargs="+", required=True, metavar="DIR", help="models to judge")
    add("--teacher", metavar="DIR", help="the model they should behave like")
    add("--data", metavar="FILE", help="held-out rows: JSONL, Parquet, text or a Hub id")
    add("--tasks", metavar="NAMES", help="instead: tasks of the lm-evaluation-harness, as piqa,arc_easy")
    add_columns(parser)
    add(
        "--supervise", choices=("answer", "all"), default="answer", help="tokens that count (default: answer)"
    )
    add("--limit", type=positive, metavar="N", help="the first N rows only, or documents of each task")
    add("--batch-size", type=positive, metavar="B", help="rows at once (default: 128; with --tasks 8)")
    add(
        "--max-length",
        type=positive,
        default=1024,
        metavar="T",
        help="tokens of a row (default: 1024)",
    )
    add(
        "--max-new-tokens",
        type=positive,
        metavar="T",
        help="of a written answer (default: longest reference + 32; with --tasks the task's)",
    )
    add("--no-exact-match", action="store_true", help="do not generate")
    add("--include-path", metavar="DIR", help="folder of task YAMLs, such as configs/tasks")
    add("--data-dir", default=".", metavar="DIR", help="folder of the files those YAMLs name (default: .)")
    add("--num-fewshot", type=natural, metavar="K", help="solved examples before each (default: the task's)")
    add("--chat", action="store_true", help="ask tasks as chats, by the model's template")
    parser.add_figures_options()
    parser.add_model_options()
    args = parser.parse_args(argv)
    _check_options(args, parser)
    args.batch_size = args.batch_size or (8 if args.tasks is not None else 128)
    return args


def _check_options(args: argparse.Namespace, parser: Parser) -> None:
    """Refuse two kinds of judgement at once, and options that the chosen kind would ignore."""
    if (args.data is None) == (args.tasks is None):
        raise ConfigError(
            f"--data, --tasks: {'neither' if args.data is None else 'both'} given. Give one: --data FILE for "
            f"held-out rows, --tasks NAMES for public tasks."
        )
    used, idle = ("--data", OF_TASKS) if args.tasks is None else ("--tasks", OF_ROWS)
    if ignored := [key for key in idle if getattr(args, key) != parser.get_default(key)]:
        options = ", ".join(f"--{key.replace('_', '-')}" for key in ignored)
        raise ConfigError(f"{options}: means nothing with {used}. Leave it out.")
