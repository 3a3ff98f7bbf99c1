"""Memory that runs out and processes that are lost end a run with one message that says what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import src.cli
from src.cli import main
from src.models.loading import load_model
from src.training import watchdog


def test_memory_that_runs_out_names_the_knobs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def greedy(argv: list[str]) -> None:
        torch.empty(2**50)

    monkeypatch.setattr(src.cli, "run", greedy)
    with pytest.raises(SystemExit) as ended:
        main([])
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert said.count("\n") == 1, "one message"
    for knob in (
        "batch_size",
        "max_length",
        "chunk_tokens",
        "CheckpointActivations",
        "quantize",
        "fsdp2.yaml",
    ):
        assert knob in said


def test_memory_that_runs_out_while_a_model_is_loaded_names_them_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], teacher_dir: str
) -> None:
    def greedy(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", greedy)
    monkeypatch.setattr(src.cli, "run", lambda _: load_model(teacher_dir))
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 1
    assert "quantize" in capsys.readouterr().err


def test_an_error_of_a_gpu_and_one_behind_another_are_understood() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert "batch_size" in str(watchdog.explain(error))
    outer = RuntimeError("while training")
    outer.__cause__ = error
    assert "batch_size" in str(watchdog.explain(outer))
    assert watchdog.explain(ValueError("something else")) is None


def test_the_message_names_keys_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    import inspect

    from src.data.tokenized import Tokenized
    from src.losses.distill import Distillation

    assert {"batch_size", "max_length"} <= inspect.signature(Tokenized).parameters.keys()
    assert "chunk_tokens" in inspect.signature(Distillation).parameters
    assert Path("configs/cache/recover.yaml").exists()


def test_a_lost_connection_counts_only_among_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:1")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert watchdog.explain(error) is None
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert "--ckpt_path" in str(watchdog.explain(error))


@pytest.mark.parametrize(
    ("given", "watches"),
    [
        ({}, False),
        ({watchdog.PARENT: "own"}, True),
        ({watchdog.PARENT: "1"}, False),
        ({"LOCAL_RANK": "1"}, True),
    ],
)
def test_a_parent_is_watched_by_what_it_launched_alone(
    given: dict[str, str], watches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a stage starts itself has another parent, and what a user starts has none to end with."""
    for name in ("LOCAL_RANK", watchdog.PARENT):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, str(os.getppid()) if value == "own" else value)
    watched: list[object] = []
    monkeypatch.setattr(watchdog, "_watch", lambda gone, *_: watched.append(gone()))
    watchdog.watch_parent()
    assert watched == ([None] if watches else []), "and it has not gone"


@pytest.mark.slow
def test_a_stage_ends_after_the_command_that_started_it_is_killed(tmp_path: Path) -> None:
    done = tmp_path / "done"
    watched = (
        "import pathlib, sys, time; from src.training import watchdog\n"
        f"watchdog.watch_parent(0.1); pathlib.Path({str(done)!r}).touch(); time.sleep(60)"
    )
    starter = (
        "import os, subprocess, sys, time; from src.training import watchdog\n"
        f"child = subprocess.Popen([sys.executable, '-c', {watched!r}], stderr=2,\n"
        "    env={**os.environ, watchdog.PARENT: str(os.getpid())})\n"
        f"while not os.path.exists({str(done)!r}): time.sleep(0.05)\n"
        "os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", starter], capture_output=True, text=True, timeout=300)
    assert killed.returncode == -9
    assert "that started this one was lost" in killed.stderr, "it held the stream until it ended"


def test_a_rank_that_dies_ends_the_one_that_waits() -> None:
    """A process that hangs, as in a collective of a GPU, is ended with a message soon after its child."""
    code = (
        "import subprocess, sys, time; from src.training import watchdog\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import os; os.kill(os.getpid(), 9)'])\n"
        "watchdog.watch_children([child], 0.1)\ntime.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == 1
    assert "local rank 1 ended with code -9" in done.stderr
    assert "--ckpt_path" in done.stderr
