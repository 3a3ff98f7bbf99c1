from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launch import Bench


@pytest.fixture
def bench(tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str) -> Bench:
    return Bench(tmp_path, teacher_dir, corpus_file, mask_file)
