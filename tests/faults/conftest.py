"""The tiny files on which faults are tried, and short runs on them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from src.mask import Mask
from src.models.fingerprint import weights_fingerprint
from tests.faults.resuming import Run, key
from tests.faults.runs import Files


@pytest.fixture
def files(tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str) -> Files:
    """A tiny model, a corpus and a mask, and a directory for runs on them."""
    return Files(tmp_path, teacher_dir, corpus_file, mask_file)


@pytest.fixture(scope="module")
def child(teacher_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of the teacher's shape and tokenizer with other weights, as fine-tuning leaves them."""
    path = tmp_path_factory.mktemp("child") / "child"
    shutil.copytree(teacher_dir, path)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.01)
    model.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def recovery(tmp_path_factory: pytest.TempPathFactory, teacher_dir: str, corpus_file: str) -> Run:
    """A recovery that was stopped after two steps; its mask names the model."""
    out = tmp_path_factory.mktemp("recovery")
    mask = Mask(teacher_dir, 6, (0, 2, 3, 5), "test", fingerprint=weights_fingerprint(teacher_dir))
    mask.save(out / "mask.json")
    run = Run("recover", out, teacher_dir, corpus_file, **{key("mask"): str(out / "mask.json")})
    del run.settings[key("model")]
    run.fit()
    return run
