"""The shipped commands: write the cache, write it again, recover from it without a teacher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from src.cache import Cache
from src.cli import run


def test_predict_writes_a_cache_and_recovery_learns_from_it(
    tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str
) -> None:
    out = str(tmp_path / "cache")
    quick = [f"--trainer.logger.init_args.save_dir={tmp_path}/logs", "--trainer.accelerator=cpu"]
    data = [f"--data.init_args.tokenizer={teacher_dir}", f"--data.init_args.train={corpus_file}"]
    write = ["predict", "--config", "configs/cache/topk.yaml", *quick, *data]
    write += [f"--model.init_args.model={teacher_dir}", f"--model.init_args.out={out}"]
    run(write)
    first = Path(out, "part-0", "manifest.json").read_bytes()
    run(write)
    assert Path(out, "part-0", "manifest.json").read_bytes() == first
    assert Cache(out).about.k == 10

    recover = ["fit", "--config", "configs/recover/entropy_kd.yaml", "--config", "configs/cache/recover.yaml"]
    recover += [*quick, f"--model.init_args.model={teacher_dir}", f"--model.init_args.mask={mask_file}"]
    recover += [f"--data.init_args.tokenizer={teacher_dir}", f"--data.init_args.train={out}"]
    recover += [
        f"--data.init_args.validation={out}",
        "--data.init_args.batch_size=4",
        "--trainer.max_steps=6",
    ]
    trial = ["--length", "256", "--trial", "2", "--json", str(tmp_path / "plan.json")]
    run(["plan", *recover[1:], *trial])
    told = json.loads((tmp_path / "plan.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    rows = [json.loads(line) for line in Path(corpus_file).read_text().splitlines()]
    ids = tokenizer([f"{row['question']}\n{row['answer']}{tokenizer.eos_token}" for row in rows]).input_ids
    assert told["tokens"] == pytest.approx(6 * 4 * sum(map(len, ids)) / len(ids), rel=0.05)
    run(recover)
    (checkpoint,) = (tmp_path / "logs").rglob("last.ckpt")
    state = torch.load(checkpoint, weights_only=False)
    assert not [key for key in state["state_dict"] if "teacher" in key]
