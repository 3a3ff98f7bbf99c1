"""The tiny files on which faults are tried."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.runs import Files


@pytest.fixture
def files(tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str) -> Files:
    """A tiny model, a corpus and a mask, and a directory for runs on them."""
    return Files(tmp_path, teacher_dir, corpus_file, mask_file)
