"""Judge models beside their teacher on the same rows: ``python -m src.cli evaluate``.

Three questions, three kinds of figures. Does it still say the same? Exact KL from the teacher over the whole
vocabulary, and the share of tokens where both rank the same token first. Does it still model the text?
Loss and perplexity. Does it still solve the task? Exact match of the final answer after free greedy
generation, with the items that flipped against the teacher and the probability that chance alone flips
them so unevenly (McNemar's exact test).

Shapes: B rows, T tokens, N judged positions (those that predict a supervised token), V vocabulary.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterable
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from src.command import Parser, family, provenance, show
from src.data.arithmetic import final_answer
from src.data.columns import Columns
from src.data.judging import Rows, batches, encode, prompt, read_rows
from src.errors import ConfigError
from src.evaluate import tasks
from src.evaluate.flips import flips
from src.evaluate.generate import greedy, new_tokens, stop_tokens
from src.files import write_json
from src.models.loading import load_tokenizer, shared_positions
from src.ranges import natural, positive

# ---------------------------------------------------------------------- held-out text


ROW_SUMS = ("loss", "teacher_loss", "kl", "agreement", "tokens")
"""Columns of :func:`row_sums`."""


def held_out(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batches: Iterable[dict[str, Tensor]],
    chunk: int = 1024,
) -> dict[str, float]:
    """Divergence, agreement and loss, as means over the supervised tokens of all batches.

    The models' own logits are judged, over the whole vocabulary, in float32.

    Args:
        student: the model to judge.
        teacher: what it should behave like; None leaves loss and perplexity alone.
        batches: ``input_ids, attention_mask, labels`` (not shifted), each ``[B, T]``.
        chunk: tokens whose float32 logits are held at once.

    Returns:
        ``loss`` (nats), ``perplexity``, ``tokens``; beside a teacher also ``kl`` (nats, teacher to
        student), ``agreement`` and ``teacher_loss``.

    Raises:
        ConfigError: nothing is supervised.
    """
    sums = row_sums(student, teacher, batches, chunk).sum(0)
    tokens = int(sums[-1])
    if tokens == 0:
        raise ConfigError("--data: no row has a supervised token. Check --answer and --max-length.")
    loss, teacher_loss, kl, agreement = (sums[:-1] / tokens).tolist()
    figures = {"loss": loss, "perplexity": math.exp(loss), "tokens": tokens}
    if teacher is None:
        return figures
    return figures | {"kl": kl, "agreement": agreement, "teacher_loss": teacher_loss}


@torch.inference_mode()
def row_sums(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batches: Iterable[dict[str, Tensor]],
    chunk: int = 1024,
) -> Tensor:
    """What :func:`held_out` is the mean of, row by row: ``[rows, 5]`` float64, columns :data:`ROW_SUMS`."""
    rows = [torch.zeros(0, len(ROW_SUMS), dtype=torch.float64)]
    for batch in batches:
        batch = {key: value.to(student.device) for key, value in batch.items()}
        labels_BT = batch.pop("labels")[:, 1:]
        judged_BT = labels_BT != -100
        labels_N = labels_BT[judged_BT]
        own_NV = _logits(student, batch)[judged_BT]
        other_NV = own_NV if teacher is None else _logits(teacher, batch)[judged_BT]
        parts = zip(*(x.split(chunk) for x in (own_NV, other_NV, labels_N)), strict=True)
        compared_NC = torch.cat([_compare(*part) for part in parts])
        row_N = judged_BT.nonzero()[:, 0]
        sums_BC = compared_NC.new_zeros(len(labels_BT), len(ROW_SUMS)).index_add_(0, row_N, compared_NC)
        rows.append(sums_BC.cpu())
    return torch.cat(rows)


def _logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Logits ``[B, T - 1, V]`` of all positions that have a next token."""
    return model(**batch, use_cache=False).logits[:, :-1]


def _compare(own_NV: Tensor, other_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Columns ``[N, 5]``: own loss, the other's loss, KL(other || own), equal first choices, one."""
    own_NV, other_NV = (x.float().log_softmax(-1) for x in (own_NV, other_NV))
    agree_N = own_NV.argmax(-1) == other_NV.argmax(-1)
    kl_N = F.kl_div(own_NV, other_NV, log_target=True, reduction="none").sum(-1)
    losses = [F.nll_loss(x, labels_N, reduction="none") for x in (own_NV, other_NV)]
    return torch.stack([*losses, kl_N, agree_N, torch.ones_like(kl_N)], -1).double()


# ---------------------------------------------------------------------- the task


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    prompt_column: str = "question",
    answer_column: str = "answer",
    max_new_tokens: int | None = None,
    batch_size: int = 128,
    positions: int = sys.maxsize,
) -> dict[str, Any]:
    """Share of rows whose final answer (``#### n``) is right after free greedy generation.

    Args:
        model: the model to judge, in eval mode.
        tokenizer: its tokenizer.
        rows: prompts, and reference answers that end in ``#### n``.
        prompt_column: column of the prompt.
        answer_column: column of the reference.
        max_new_tokens: most tokens of an answer; None is the longest reference and 32 more.
        batch_size: prompts decoded together.
        positions: tokens that prompt and answer may have together.

    Returns:
        ``exact_match``, ``correct`` (one bool a row), ``texts`` (what was generated), ``new_tokens``,
        ``seconds``.

    Raises:
        ConfigError: a reference has no final answer, or there are too few positions.
    """
    began = time.monotonic()
    wanted = [final_answer(row[answer_column]) for row in rows]
    if None in wanted:
        raise ConfigError(
            f"--answer: '{answer_column}' of row {wanted.index(None) + 1} does not end in '#### <number>', "
            f"so there is nothing to match. Add --no-exact-match."
        )
    encoded = encode(tokenizer, rows, Columns(prompt=prompt_column, answer=answer_column))
    prompts = [prompt(row) for row in encoded]
    longest = max(len(row.ids) - len(start) for row, start in zip(encoded, prompts, strict=True))
    limit = new_tokens(prompts, positions, max_new_tokens, longest + 32)
    new = greedy(model, prompts, limit, stop_tokens(model, tokenizer), batch_size)
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    correct = [final_answer(text) == want for text, want in zip(texts, wanted, strict=True)]
    return {
        "exact_match": sum(correct) / len(correct),
        "correct": correct,
        "texts": texts,
        "new_tokens": sum(map(len, new)),
        "seconds": time.monotonic() - began,
    }


# ---------------------------------------------------------------------- command


OF_ROWS = ("prompt", "answer", "text", "supervise", "max_length", "max_new_tokens", "no_exact_match")
OF_TASKS = ("include_path", "data_dir", "num_fewshot")
"""Options of one kind of judgement only."""


def main(argv: list[str]) -> None:
    """Judge the models, print the table, write the JSON."""
    args, began = _parse(argv), time.monotonic()
    if args.tasks is not None:
        tasks.main(args, argv)
        return
    rows = read_rows(args.data, args.limit)
    columns = Columns(args.text, args.prompt, args.answer).of(rows[0])
    tokenizer = load_tokenizer(args.teacher or args.model[0])
    positions = shared_positions([*([args.teacher] if args.teacher else []), *args.model], args.max_length)
    encoded = encode(tokenizer, rows, columns, args.supervise, min(args.max_length, positions))
    task = None if args.no_exact_match else _task(columns, rows[0])
    teacher, results = None, list[dict[str, Any]]()
    for result, model in family(args, tokenizer):
        text = batches(encoded, args.batch_size, tokenizer.pad_token_id or 0)
        result |= held_out(model, teacher, text)
        if task:
            new, size = args.max_new_tokens, args.batch_size
            result |= exact_match(model, tokenizer, rows, *task, new, size, positions)
        if args.teacher and teacher is None:
            teacher = model
            result |= {"kl": 0.0, "agreement": 1.0}
        results.append(result)
    if task and teacher is not None:
        for result in results[1:]:
            if right := results[0]["exact_match"]:
                result["retention"] = result["exact_match"] / right
            result["flips"] = flips(result["correct"], results[0]["correct"])
    show(summary(results, f"{len(rows)} rows of {args.data}"))
    if args.out:
        origin = provenance("evaluate", argv, model) | {"seconds": time.monotonic() - began}
        prompts = [row[task[0]] for row in rows[:3]] if task else []
        figures = _record(results, teacher is not None) | {"rows": len(rows), "prompts": prompts}
        write_json(args.out, figures | origin)


def _task(columns: Columns, row: dict[str, Any]) -> tuple[str, str] | None:
    """The columns of prompt and reference, if the reference ends in a final answer."""
    if columns.prompt is None or columns.answer is None or final_answer(row[columns.answer]) is None:
        return None
    return columns.prompt, columns.answer


def summary(results: list[dict[str, Any]], title: str) -> Table:
    """One row a model; each figure that has one beside its ratio to the first row's, the teacher's."""
    table = Table(title=title)
    table.add_column("model", overflow="fold")
    for heading in ["layers", "parameters", "exact match", "lost / gained", "KL", "agreement", "perplexity"]:
        table.add_column(heading, justify="right", no_wrap=True)
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
    """The JSON: verdicts as a string of 0 and 1, and the first few texts."""
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
    add("--prompt", metavar="COLUMN", help="column of the prompt (default: well-known names)")
    add("--answer", metavar="COLUMN", help="column of the answer, together with --prompt")
    add("--text", metavar="COLUMN", help="column of plain text, instead of prompt and answer")
    add("--supervise", choices=("answer", "all"), default="answer", help="tokens that count")
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
        help="of an answer (default: longest reference + 32)",
    )
    add("--no-exact-match", action="store_true", help="do not generate")
    add("--include-path", metavar="DIR", help="folder of task YAMLs, such as configs/tasks")
    add("--data-dir", default=".", metavar="DIR", help="folder of the files those YAMLs name (default: .)")
    add("--num-fewshot", type=natural, metavar="K", help="solved examples before each (default: the task's)")
    add("--out", metavar="FILE", help="write the figures as JSON")
    parser.add_model_options()
    args = parser.parse_args(argv)
    _check_options(args, parser)
    args.batch_size = args.batch_size or (8 if args.tasks is not None else 128)
    return args


def _check_options(args: argparse.Namespace, parser: Parser) -> None:
    """One kind of judgement at a time, and no option that it would ignore."""
    if (args.data is None) == (args.tasks is None):
        raise ConfigError(
            f"--data, --tasks: {'neither' if args.data is None else 'both'} given. Give one: --data FILE for "
            f"held-out rows, --tasks NAMES for public tasks."
        )
    used, idle = ("--data", OF_TASKS) if args.tasks is None else ("--tasks", OF_ROWS)
    if ignored := [key for key in idle if getattr(args, key) != parser.get_default(key)]:
        options = ", ".join(f"--{key.replace('_', '-')}" for key in ignored)
        raise ConfigError(f"{options}: means nothing with {used}. Leave it out.")
