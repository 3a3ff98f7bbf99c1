"""The command of each stage under each variant: a shipped config, sizes, a strategy's overlay."""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path

import yaml

from scripts.gpu.shapes import directory, middle_mask, rows
from scripts.lab.benches import BARE
from scripts.lab.results import JSON
from src.files import write_text

STAGES = {
    "search": ("fit", "configs/search/gumbel_topk.yaml"), "cache": ("predict", "configs/cache/topk.yaml"),
    "recover": ("fit", "configs/recover/entropy_kd.yaml"),
}  # fmt: skip
QUANTISED = ("int8", "nf4")


@dataclass(frozen=True)
class Size:
    """How much a stage reads, and how a recovery of it fits into 80 GB on one device.

    Attributes:
        batch: rows of a batch.
        length: tokens of a row.
        rate: tokens a second that the cache writes about, to end it in time.
        dtype: of the weights in a recovery; search and cache hold bf16.
        scope: what the recovery trains.
        recompute: whether activations are recomputed in the backward pass.
        why: a word on the choice, for the table.
    """

    batch: int
    length: int
    rate: int
    dtype: str
    scope: str
    recompute: bool
    why: str


SIZES = {
    "0.6b": Size(16, 1024, 120_000, "float32", "full", False, "AdamW on all weights in float32"),
    "8b": Size(
        8, 1024, 20_000, "bfloat16", "cut_adjacent", True,
        "AdamW in float32 would take 103 GB for the cut alone: bf16, only the blocks next to the cut train",
    ),
}  # fmt: skip
TINY = Size(2, 64, 64, "float32", "full", False, "rehearsal")


def command(args: argparse.Namespace, shape: str, variant: str, stage: str) -> list[str]:
    """Arguments of ``python -m src.cli`` for one stage; its overlay and its data are written.

    A quantised variant runs on one device: the search and the cache on quantised weights, the recovery beside
    a quantised teacher.
    """
    verb, config = STAGES[stage]
    strategy = "single" if variant in QUANTISED else variant
    overlay = args.work / "overlays" / f"{shape}-{variant}-{stage}.yaml"
    write_text(overlay, yaml.safe_dump(settings(args, shape, variant, stage), sort_keys=False))
    return [
        verb, "--config", config, "--config", str(overlay), "--config", f"configs/strategy/{strategy}.yaml",
        "--trainer.devices", "1", "--trainer.accelerator", "gpu" if args.device.startswith("cuda") else "cpu",
        "--trainer.precision", "32-true" if args.tiny else "bf16-mixed",
    ]  # fmt: skip


def settings(args: argparse.Namespace, shape: str, variant: str, stage: str) -> JSON:
    """The overlay: sizes, a minute's end, and only the callbacks that a measurement needs."""
    how, work = TINY if args.tiny else SIZES[shape], args.work
    model, name = directory(shape, work, args.device, args.tiny), f"{shape}-{variant}-{stage}"
    texts = rows(work, 16 if args.tiny else 8000, 2 if args.tiny else 20)
    meter = {"class_path": "scripts.gpu.meter.Meter", "init_args": {"path": str(result(work, name))}}
    quantize = variant if variant in QUANTISED else None
    anneal = {"class_path": "src.callbacks.TemperatureAnnealing"}
    batches = 3 if args.tiny else how.rate * args.seconds // (how.batch * how.length)
    trainer = {**BARE, "callbacks": [meter], "limit_predict_batches": batches}
    trainer["default_root_dir"] = str(work / "runs" / name)
    if stage != "cache":
        trainer |= {"max_steps": 4 if args.tiny else 100_000, "limit_val_batches": 0}
        trainer["max_time"] = {"seconds": args.seconds}
    frozen = {"dtype": "float32" if args.tiny else "bfloat16", "quantize": quantize}
    models: dict[str, JSON] = {
        "search": {
            "model": str(model), "calibration_batches": 1, "checkpoint_activations": how.recompute,
            "policy": {"init_args": {"candidates": 1, "polish": False}}, **frozen,
        },
        "cache": {"model": str(model), "out": str(work / "cache" / name), "count_seconds": 0.0, **frozen},
        "recover": {
            "mask": str(middle_mask(model, work)), "dtype": how.dtype, "scope": how.scope,
            "checkpoint_activations": how.recompute,
            "teacher": {"class_path": "src.teachers.LiveTeacher", "init_args": frozen},
        },
    }  # fmt: skip
    if stage == "search":
        trainer["callbacks"] = [anneal, {"class_path": "src.callbacks.HardenMask"}, meter]
    data: JSON = {"train": str(texts), "batch_size": how.batch, "max_length": how.length}
    data |= {"validation": str(rows(work, 16, 20))} if stage == "search" else {}
    return {"model": {"init_args": models[stage]}, "data": {"init_args": data}, "trainer": trainer}


def result(work: Path, name: str) -> Path:
    """Where the meter of a case writes."""
    return work / "meter" / f"{name}.json"


def fresh(work: Path, name: str) -> None:
    """Forget an earlier run of a case: a cache would be resumed."""
    result(work, name).unlink(missing_ok=True)
    shutil.rmtree(work / "cache" / name, ignore_errors=True)
