"""The work itself: each function is one job in a process of its own, takes plain values and returns JSON.

Searches, caches and recoveries are the product's own commands; only their settings are written here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel

from scripts.arena.plan import Gone, nested
from src.cli import run
from src.data.arithmetic import SPLITS, write_splits
from src.data.columns import Columns
from src.data.judging import batches, judged, read_rows
from src.evaluate.text import ROW_SUMS, row_sums
from src.evaluate.verb import exact_match
from src.files import write_text
from src.mask import Mask
from src.models.cut import cut as shorten
from src.models.layers import num_layers
from src.models.loading import load_config, load_model, load_tokenizer
from src.repair.linear_patch import LinearPatch

JSON = dict[str, Any]
ROWS = "fit/record.rows.safetensors"
"""Where the names of the rows lie that a search or recovery has read."""


def data(at: str, sizes: dict[str, int], seed: int) -> JSON:
    """Generate the three splits."""
    write_splits(Path(at), {split: sizes[split] for split in SPLITS}, seed)
    return {"sizes": sizes, "seed": seed}


def files(at: str, parts: JSON) -> JSON:
    """Copy the rows of the three splits out of files."""
    for split, told in parts.items():
        rows = Path(told["path"]).read_text().split("\n")[told.get("skip", 0) :][: told["rows"]]
        write_text(f"{at}/{split}.jsonl", "\n".join(rows) + "\n")
    return {}


def cache(at: str, configs: list[str], settings: JSON) -> JSON:
    """Write the teacher's cache, which every recovery reads."""
    command(at, "predict", configs, {**settings, "model.init_args.out": f"{at}/cache"})
    return {}


def teacher(at: str, model: str, rows: str) -> JSON:
    """Judge the teacher, once."""
    return judge(load_model(model), model, rows)


def search(at: str, configs: list[str], settings: JSON) -> JSON:
    """Find a mask."""
    module = command(at, "fit", configs, settings).model
    found = Mask.load(f"{at}/fit/mask.json")
    learned = named(found, sorted({*range(found.units)} - {*module.policy.harden()}))
    return {
        "removed": named(found, found.removed), "learned": learned, "method": found.method,
        "tokens": found.tokens_seen, "rows": f"{at}/{ROWS}", "metrics": found.metrics,
    }  # fmt: skip


def given(at: str, removed: Gone) -> JSON:
    """A mask that needs no search."""
    return {"removed": removed, "learned": removed, "method": "given", "tokens": 0, "metrics": {}}


def cut(at: str, model: str, removed: Gone, rows: str, repair: JSON | None = None) -> JSON:
    """Judge a mask without recovery, the cut model repaired if keys of ``LinearPatch`` are given."""
    parent, wanted = load_model(model), mask(model, removed)
    student = shorten(parent, wanted)
    if repair:
        LinearPatch(**repair)(student, parent, wanted, load_tokenizer(model))
    return judge(student, model, rows)


def recover(at: str, model: str, removed: Gone, rows: str, configs: list[str], settings: JSON) -> JSON:
    """Recover a mask, grow it to the number of layers that the settings call ``grow``, judge the result."""
    mask(model, removed).save(f"{at}/mask.json")
    layers = settings.pop("grow", None)
    module = command(at, "fit", configs, {**settings, "model.init_args.mask": f"{at}/mask.json"}).model
    student = module.model.eval()
    if layers:
        student.save_pretrained(f"{at}/small")
        where = {"model": f"{at}/small", "mask": f"{at}/mask.json", "sizes": layers, "out": f"{at}/grown"}
        text = {"data": Path(rows).with_name("validation.jsonl"), "rows": 128, "supervise": "all"}
        run(["grow", "--force", *(f"--{key}={value}" for key, value in (where | text).items())])
        student = load_model(f"{at}/grown/{layers}-layers")
    record = json.loads(Path(at, "fit", "record.json").read_text())
    measured = {key: float(x) for key, x in module.trainer.callback_metrics.items() if "val/" in key}
    told = {"tokens": module.tokens, "steps": record["steps"], "fit_seconds": record["seconds"]}
    return {**told, "measured": measured, "rows": f"{at}/{ROWS}", **judge(student, model, rows)}


def command(at: str, verb: str, configs: list[str], settings: JSON) -> Any:
    """Run a command of ``src.cli`` with its settings in a file; its logs and results go to ``<at>/fit``."""
    logger = {"save_dir": at, "name": "fit", "version": ""}
    settings = {**settings, **{f"trainer.logger.init_args.{key}": value for key, value in logger.items()}}
    write_text(f"{at}/settings.yaml", yaml.safe_dump(nested(settings)))
    files = [part for config in (*configs, f"{at}/settings.yaml") for part in ("--config", config)]
    return run([verb, *files])


def named(mask: Mask, units: Iterable[int]) -> Gone:
    """Units as a plan names them: layers by number, halves by layer and kind, such as ``7a`` and ``9f``.

    Of units of width each layer's are the bits of a number, ``channel:256:f00d``.
    """
    if mask.width:
        own = [sum(1 << u % mask.width for u in units if u // mask.width == i) for i in range(mask.depth)]
        return [f"{mask.unit}:{mask.width}:{bits:x}" for bits in own]
    return list(units) if mask.unit == "layer" else [f"{u // 2}{'af'[u % 2]}" for u in units]


def mask(model: str, removed: Gone) -> Mask:
    """The mask of some removed layers, halves or units of width."""
    count = num_layers(load_config(model))
    if ":" in str(removed[0]):
        unit, width = removed[0].split(":")[0], int(removed[0].split(":")[1])
        bits = [int(own.rpartition(":")[2], 16) for own in removed]
        keep = tuple(i for i in range(count * width) if not bits[i // width] >> i % width & 1)
        return Mask(model, count, keep, "arena", unit=unit, width=width)
    kinds = "af" if isinstance(removed[0], str) else [""]
    every = [f"{layer}{kind}" for layer in range(count) for kind in kinds]
    keep = tuple(unit for unit, name in enumerate(every) if name not in map(str, removed))
    return Mask(model, count, keep, "arena", unit="half" if len(kinds) > 1 else "layer")


@torch.inference_mode()
def judge(student: PreTrainedModel, model: str, rows: str) -> JSON:
    """Exact match after free generation, and for each problem the sums that divergence is the mean of.

    Returns:
        ``sums``, the columns of :func:`src.evaluate.text.row_sums`; and, of problems alone, ``correct``, a
        string of 0 and 1. A text has no answer.
    """
    tokenizer, read, parent = load_tokenizer(model), read_rows(rows), load_model(model)
    encoded = judged(tokenizer, read, Columns(), "all", parent.config.max_position_embeddings).rows
    sums_RC = row_sums(student, parent, batches(encoded, 64, tokenizer.pad_token_id or 0))
    told = {
        "sums": dict(zip(ROW_SUMS, sums_RC.T.tolist(), strict=True)),
        "parameters": sum(p.numel() for p in student.parameters()),
    }
    if "text" in read[0]:
        return told
    answers = exact_match(student, tokenizer, read)["correct"]
    return {"correct": "".join("01"[ok] for ok in answers), **told}
