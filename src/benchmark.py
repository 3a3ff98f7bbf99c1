"""Measure prefill and decode speed beside a baseline and beside the ideal: ``python -m src.cli benchmark``.

The models run in one process and take turns at every token: each reads a prompt (prefill), then decodes
with its cache. The speed-up is the median over repeats of the ratio within a repeat, with its quartiles.

The ideal is the ratio of the floating-point operations in the very calls that are timed: those of the layers
and of the output head. For a cut of L to K layers it is (L a + b) / (K a + b), with a those of a layer and b
those of the head. What a model does beside these (embedding, masks, norms, Python) does not shrink with its
layers, so a measured speed-up stays below the ideal.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import Cache, PreTrainedModel

from src.command import Parser, device_name, load, provenance, show
from src.errors import ConfigError
from src.files import write_json
from src.models.costs import NEW, PROMPT, flops, parameters
from src.models.decoding import step
from src.models.layers import num_layers, text_config
from src.models.positions import positions_of
from src.ranges import positive
from src.training.progress import track

PHASES = ("prefill", "decode")


def race(models: list[PreTrainedModel], ids_BT: Tensor, new_tokens: int) -> Tensor:
    """Return the seconds ``[models, 2]`` that each model takes to read prompts, and to decode new tokens.

    The models take turns at every token (in the order ABBA), so that whatever else the machine does, however
    briefly, slows all of them alike.

    Args:
        models: the models.
        ids_BT: prompts that all of them read.
        new_tokens: number of tokens that each decodes.
    """
    seconds = torch.zeros(len(models), len(PHASES), dtype=torch.float64)
    fed = [ids_BT.to(model.device) for model in models]
    caches: list[Cache | None] = [None] * len(models)
    for call in range(1 + new_tokens):
        for turn in range(len(models)):
            at = (call + turn) % len(models)
            began = _now(models[at].device)
            fed[at], caches[at] = step(models[at], fed[at], cache=caches[at])
            seconds[at, min(call, 1)] += _now(models[at].device) - began
    return seconds


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def compare(
    models: list[PreTrainedModel], batch_size: int, prompt_tokens: int, new_tokens: int, repeats: int
) -> list[dict[str, Any]]:
    """Time models against the first of them, the baseline, on random prompts.

    Args:
        models: the models, the baseline first.
        batch_size: number of prompts.
        prompt_tokens: tokens of a prompt.
        new_tokens: tokens that are decoded after each.
        repeats: how often all models are timed.

    Returns:
        For each model, in order, a dict with ``prefill`` and ``decode``. Each has the medians over repeats
        ``tokens_per_s`` and ``speedup``, their quartiles ``[low, high]`` as ``iqr`` and ``speedup_iqr``, the
        ``speedups`` of all repeats, and the ``ideal`` speed-up.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(text_config(model.config).vocab_size for model in models)
    ids_BT = torch.randint(vocabulary, (batch_size, prompt_tokens), generator=generator)
    work = torch.tensor([flops(m, ids_BT.to(m.device), new_tokens) for m in models], dtype=torch.float64)
    race(models, ids_BT, new_tokens)  # warm-up, after that of the counting
    turns = track(range(repeats), f"repeats at batch size {batch_size}")
    seconds = torch.stack([race(models, ids_BT, new_tokens) for _ in turns])
    tokens = torch.tensor([batch_size * prompt_tokens, batch_size * new_tokens])
    speeds, ratios, ideals = tokens / seconds, seconds[:, :1] / seconds, work[0] / work
    return [
        {
            phase: of_repeats(speeds[:, at, p], ratios[:, at, p]) | {"ideal": float(ideals[at, p])}
            for p, phase in enumerate(PHASES)
        }
        for at in range(len(models))
    ]


def of_repeats(speeds: Tensor, ratios: Tensor) -> dict[str, Any]:
    """Return medians and quartiles over repeats of a model's tokens a second, and of its speed-up."""
    quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    low, speed, high = speeds.quantile(quartiles).tolist()
    least, ratio, most = ratios.quantile(quartiles).tolist()
    return {
        "tokens_per_s": speed,
        "iqr": [low, high],
        "speedup": ratio,
        "speedup_iqr": [least, most],
        "speedups": ratios.tolist(),
    }


def verdict(name: str, phase: str, batch_size: int, figures: dict[str, Any]) -> str | None:
    """Return a warning, one sentence, if a speed-up falls short, else None.

    It falls short below 90 % of the ideal one, or if its lower quartile is at most 1.

    Args:
        name: name of the model, for the message.
        phase: ``prefill`` or ``decode``.
        batch_size: number of prompts, for the message.
        figures: what :func:`compare` returned for this model and phase.
    """
    speedup, ideal, (least, most) = figures["speedup"], figures["ideal"], figures["speedup_iqr"]
    what = f"{name}, {phase} at batch size {batch_size}: {speedup:.2f}x (quartiles {least:.2f} to {most:.2f})"
    if least <= 1.0:
        return f"{what}. No speed-up was measured; the ideal is {ideal:.2f}x."
    if speedup < 0.9 * ideal:
        return (
            f"{what}, {speedup / ideal:.0%} of the ideal {ideal:.2f}x. The rest is work outside the layers; "
            f"a larger model or batch comes closer."
        )
    return None


def main(argv: list[str]) -> None:
    """Measure the models, print the table and warnings, write the JSON.

    Raises:
        ConfigError: a model cannot be loaded, or has fewer positions than prompt and new tokens need.
    """
    args, began = _parse(argv), time.monotonic()
    names = [args.baseline, *args.model]
    models = [load(name, args, turn) for turn, name in enumerate(names)]
    if len(kinds := dict.fromkeys(map(device_name, models))) > 1:
        raise ConfigError(f"--device: speeds on different devices are not compared: {', '.join(kinds)}.")
    for name, model in zip(names, models, strict=True):
        longest = positions_of(model.config)
        if longest is not None and args.prompt_tokens + args.new_tokens > longest:
            raise ConfigError(
                f"--prompt-tokens {args.prompt_tokens} and --new-tokens {args.new_tokens} are more than the "
                f"{longest} positions of '{name}'."
            )
    table = Table(title=f"Speed beside {args.baseline}, {torch.get_num_threads()} thread(s)")
    table.add_column("model")
    for heading in ("batch", "phase", "tokens/s", "quartiles", "speed-up", "quartiles", "ideal", "of ideal"):
        table.add_column(heading, justify="right")
    measured, warnings = [], []
    for size in args.batch_size:
        results = compare(models, size, args.prompt_tokens, args.new_tokens, args.repeats)
        for name, result in zip(names, results, strict=True):
            measured.append({"path": name, "batch_size": size, **result})
            for phase in PHASES:
                table.add_row(name, str(size), phase, *_cells(result[phase]))
                if name != args.baseline:
                    warnings.append(verdict(name, phase, size, result[phase]))
    if not args.no_table:
        show(table)
    for warning in filter(None, warnings):
        print(f"note: {warning}")
    if args.out:
        sizes = [
            {"path": name, "parameters": parameters(model), "layers": num_layers(model.config)}
            for name, model in zip(names, models, strict=True)
        ]
        settings = {key: getattr(args, key) for key in ("prompt_tokens", "new_tokens", "repeats")}
        settings["seconds"] = time.monotonic() - began
        record = {"baseline": sizes[0], "models": sizes[1:], "measured": measured, **settings}
        write_json(args.out, record | provenance("benchmark", argv, models[0]))


def _cells(figures: dict[str, Any]) -> list[str]:
    (low, high), (least, most) = figures["iqr"], figures["speedup_iqr"]
    return [
        f"{figures['tokens_per_s']:,.0f}",
        f"{low:,.0f} - {high:,.0f}",
        f"{figures['speedup']:.3f}x",
        f"{least:.3f} - {most:.3f}",
        f"{figures['ideal']:.3f}x",
        f"{figures['speedup'] / figures['ideal']:.0%}",
    ]


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("benchmark", "Measure prefill and decode speed beside a baseline and the ideal.")
    add = parser.add_argument
    add("--model", nargs="+", required=True, metavar="DIR", help="models to measure")
    add("--baseline", required=True, metavar="DIR", help="what they are compared with")
    add("--batch-size", nargs="+", type=positive, default=[1], metavar="B", help="sizes (default: 1)")
    add("--prompt-tokens", type=positive, default=PROMPT, metavar="T", help=f"read (default: {PROMPT})")
    add("--new-tokens", type=positive, default=NEW, metavar="T", help=f"decoded (default: {NEW})")
    add("--repeats", type=positive, default=20, metavar="R", help="turns of each model (default: 20)")
    parser.add_figures_options()
    parser.add_model_options()
    return parser.parse_args(argv)
