"""Search and recovery say how many different tokens they read, and count what both read once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from src.cli import run
from src.data import Corpus
from src.data.batches import real_tokens
from src.data.distinct import Distinct


def fit(config: str, at: Path, *more: str) -> tuple[dict[str, float], Distinct]:
    """Run a stage; return its record, and the rows that it names."""
    logger = [
        f"--trainer.logger.init_args.{k}={v}" for k, v in (("save_dir", at), ("name", ""), ("version", ""))
    ]
    run(
        [
            "fit",
            "--config",
            config,
            "--trainer.accelerator=cpu",
            "--trainer.limit_val_batches=0",
            *logger,
            *more,
        ]
    )
    rows = load_file(at / "record.rows.safetensors")["rows"]
    return json.loads((at / "record.json").read_text()), Distinct().unite([rows])


def tokens(teacher: str, text: str, rows: int) -> int:
    """Tokens of the first rows of a corpus, counted on their own."""
    corpus = Corpus(tokenizer=teacher, train=[{"path": text, "rows": rows}])
    return sum(real_tokens(batch) for batch in corpus.predict_dataloader())


@pytest.mark.parametrize("unit", ["layer", "half"])
def test_what_both_stages_read_counts_once(
    unit: str, tmp_path: Path, teacher_dir: str, corpus_file: str
) -> None:
    first = f"--data.init_args.train=[{{path: {corpus_file}, rows: 12}}]"
    held = f"--data.init_args.validation=[{{path: {corpus_file}, rows: 6}}]"
    found, searched = fit(
        "configs/search/gumbel_topk.yaml", tmp_path / "search", f"--model.init_args.model={teacher_dir}",
        first, held, "--data.init_args.batch_size=4", "--trainer.max_steps=9",
        f"--model.init_args.unit={unit}",
    )  # fmt: skip
    whole = tokens(teacher_dir, corpus_file, 12)
    assert found["distinct_tokens"] == searched.tokens == whole  # several epochs, and rows it is judged by
    assert found["tokens"] > 2 * whole + tokens(teacher_dir, corpus_file, 6)
    recovered, read = fit(
        "configs/recover/entropy_kd.yaml", tmp_path / "recover", "--data.init_args.batch_size=5",
        f"--model.init_args.mask={tmp_path / 'search/mask.json'}", "--trainer.max_steps=6",
        f"--data.init_args.train=[{{path: {corpus_file}, rows: 20}}]", "--trainer.val_check_interval=6",
    )  # fmt: skip
    assert recovered["distinct_tokens"] == read.tokens <= tokens(teacher_dir, corpus_file, 20)
    assert recovered["tokens"] >= read.tokens
    both = Distinct().unite([searched.sample, read.sample])
    assert both.tokens <= tokens(teacher_dir, corpus_file, 20)
    assert both.tokens < searched.tokens + read.tokens


@pytest.mark.slow
@pytest.mark.parametrize("repair", ["src.linear_patch.LinearPatch", "src.repair.mask_tuning.MaskTuning"])
@pytest.mark.parametrize(("repaired", "needed"), [(24, 24), (8, 12)])
def test_what_a_repair_reads_before_training_is_text_too(
    repair: str, repaired: int, needed: int, tmp_path: Path, corpus_file: str, teacher_dir: str,
    mask_file: str,
) -> None:  # fmt: skip
    """Twelve rows train; rows of the repair that are none of them count besides, and no other."""
    rows = f"{{data: {corpus_file}, rows: {repaired}}}"
    record, read = fit(
        "configs/recover/entropy_kd.yaml", tmp_path, f"--model.init_args.mask={mask_file}",
        f"--model.init_args.patch={{class_path: {repair}, init_args: {rows}}}",
        f"--data.init_args.train=[{{path: {corpus_file}, rows: 12}}]", "--data.init_args.batch_size=4",
        "--trainer.max_steps=9",
    )  # fmt: skip
    assert record["distinct_tokens"] == read.tokens == tokens(teacher_dir, corpus_file, needed)
