"""A process on a CPU gives back what it no longer holds, and says how much it held at most."""

from __future__ import annotations

import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from src.policies import Tail
from src.search import MaskSearch
from src.training import heap
from src.training.heap import EVERY, Trimmed, peak, trim

GLIBC = platform.libc_ver()[0] == "glibc"


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not GLIBC, reason="only glibc keeps holes, and has a call that gives them back")
def test_holes_between_tensors_in_use_go_back() -> None:
    size, count = 64 * 2**10, 2_000
    tensors = [torch.ones(size, dtype=torch.uint8) for _ in range(count)]
    kept, before = tensors[::100], resident()
    del tensors
    assert trim()
    assert before - resident() > 0.8 * size * count
    assert all(tensor.all() for tensor in kept)
    assert peak(torch.device("cpu")) > 0.99 * before  # the kernel counts pages in batches


@pytest.mark.parametrize(("device", "calls"), [("cpu", 3), ("cuda", 0)])
def test_a_run_trims_every_few_steps_on_a_cpu(
    device: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[int]()
    monkeypatch.setattr(heap, "trim", lambda: seen.append(1))
    module = cast(Any, SimpleNamespace(device=torch.device(device)))
    for batch in range(2 * EVERY + 1):
        Trimmed().on_train_batch_end(cast(Any, None), module, None, None, batch)
    assert len(seen) == calls


def test_every_stage_trims(teacher_dir: str) -> None:
    search = MaskSearch(teacher_dir, Tail(), remove=1)
    assert any(isinstance(callback, Trimmed) for callback in search.configure_callbacks())


def test_a_library_that_cannot_do_it_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: SimpleNamespace())
    assert not trim()
