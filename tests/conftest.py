"""Shared fixtures: a tiny model directory, a corpus, and a guard that tests leave nothing behind."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from copy import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import _typehints

from src.data.arithmetic import problems
from src.export import proof
from src.export.fresh import verify
from tests.tiny import save_arithmetic

LAYERS = 6


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _protocols_are_read_once() -> None:
    """For each command line the parser reads the methods of all protocols anew, which no test changes."""
    read = cache(_typehints.get_protocol_signature)

    def remembered(*about: Any, **how: Any) -> tuple[list[Any], Any]:
        parameters, returned = read(*about, **how)
        return [copy(parameter) for parameter in parameters], returned

    _typehints.get_protocol_signature = remembered


@pytest.fixture(scope="session", autouse=True)
def _heed_sigint() -> None:
    """Where tests run in the background of a shell, which ignores SIGINT, what they start ignored it too."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _clean_working_directory() -> Iterator[None]:
    before = {p.name for p in Path.cwd().iterdir()}
    yield
    left = {p.name for p in Path.cwd().iterdir()} - before - {".pytest_cache", ".hypothesis"}
    assert not left, f"the test left {left} in the working directory"


@pytest.fixture(autouse=True)
def _proven_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports are proven in this process, but in tests that are about the fresh one."""
    if request.node.get_closest_marker("fresh") is None:
        monkeypatch.setattr(proof, "in_fresh_process", verify)


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random 6-layer Qwen3 with the arithmetic tokenizer, as a Hugging Face directory."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    return save_arithmetic(tmp_path_factory.mktemp("teacher"), num_hidden_layers=LAYERS, **heads)


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Forty problems as JSONL."""
    path = tmp_path_factory.mktemp("corpus") / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in problems("train", 40, 0)))
    return str(path)


@pytest.fixture
def mask_file(tmp_path: Path, teacher_dir: str) -> str:
    """A mask of the tiny teacher that removes two layers."""
    from src.mask import Mask

    path = tmp_path / "mask.json"
    Mask(model=teacher_dir, num_layers=LAYERS, keep=(0, 2, 3, 5), method="test").save(path)
    return str(path)
