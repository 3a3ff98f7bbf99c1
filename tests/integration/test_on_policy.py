"""Two stages of recovery: the first on given text, the second on what its own student writes, to the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from src.cli import main
from src.mask import Mask
from src.models.fingerprint import weights_fingerprint
from src.models.loading import load_model
from src.training.scopes import load_student
from tests.faults.runs import ended
from tests.integration.test_terms import fit


def last(out: Path) -> str:
    return str(out / "recover" / "run" / "checkpoints" / "last.ckpt")


@pytest.mark.slow
def test_a_student_is_trained_on_what_it_writes_and_exported(
    tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str
) -> None:
    """The commands of docs/recovery.md: recover, export, generate, recover from there, export, prove."""
    one, two, own = tmp_path / "one", tmp_path / "two", tmp_path / "own.jsonl"
    first = fit(one, teacher_dir, corpus_file, mask_file, "--trainer.max_steps=20")
    main(["export", "--mask", mask_file, "--checkpoint", last(one), "--out", str(tmp_path / "student")])
    main([
        "generate", "--model", str(tmp_path / "student"), "--prompts", corpus_file, "--out", str(own),
        "--limit", "12", "--temperature", "1", "--max-new-tokens", "12", "--device", "cpu",
    ])  # fmt: skip
    written = [json.loads(line) for line in own.read_text().splitlines()]
    assert len(written) == 12
    record = json.loads(Path(f"{own}.record.json").read_text())
    assert record["model"] == weights_fingerprint(str(tmp_path / "student"))
    second = fit(two, teacher_dir, str(own), mask_file, f"--model.init_args.patch={last(one)}")
    moved = zip(first.model.parameters(), second.model.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in moved)
    out = tmp_path / "out"
    main(["export", "--mask", mask_file, "--checkpoint", last(two), "--out", str(out)])
    ids = torch.arange(3, 23)[None]
    back = load_student(load_model(teacher_dir), Mask.load(mask_file), last(two))
    assert torch.equal(load_model(str(out))(ids).logits, back(ids).logits)
    assert f"an earlier recovery on {first.model.tokens:,} tokens (full)" in (out / "README.md").read_text()


def given(tmp_path: Path, teacher: str, corpus: str, mask: str, *more: str) -> list[str]:
    keys = {"model": teacher, "mask": mask}
    told = [*(f"--model.init_args.{key}={value}" for key, value in keys.items()), *more]
    told += [f"--data.init_args.train={corpus}", f"--trainer.logger.init_args.save_dir={tmp_path}"]
    return ["fit", "--config", "configs/recover/entropy_kd.yaml", "--trainer.accelerator=cpu", *told]


def test_a_misspelt_repair_is_told_what_is_accepted(
    tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("src.models.loading.load_model", None)
    more = "--model.init_args.patch=src.linear_patch.LinearPach"
    assert ended(given(tmp_path, teacher_dir, corpus_file, mask_file, more)) == 2
    text = capsys.readouterr().err
    assert text.count("error:") == 1
    assert "accepted: adapters, an existing checkpoint of an earlier recovery" in text
