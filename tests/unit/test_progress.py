"""Long steps say how far they are: lines where no terminal is, nothing of quick ones, one rank alone."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning import LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities import rank_zero_only

from src.callbacks import ProgressBar, ProgressLines
from src.training import progress
from src.training.progress import Lines, track, waiting


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that a test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_long_step_has_lines(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    for item in track(range(100), "masks"):
        seen.append(item)
        clock[0] += 1.0
    lines = capsys.readouterr().err.splitlines()
    assert seen == list(range(100))
    assert lines == [
        "masks: 10 of 100, 90 s left",
        "masks: 40 of 100, 60 s left",
        "masks: 70 of 100, 30 s left",
    ]


def test_a_quick_step_has_none(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(range(100), "masks")) == list(range(100))
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(track(iter("abc"), "letters", 3)) == ["a", "b", "c"]
    assert "letters" in capsys.readouterr().err


def test_other_ranks_are_silent(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    for _ in track(range(100), "masks"):
        clock[0] += 1.0
    assert capsys.readouterr().err == ""


def test_a_run_without_an_end_says_what_is_done(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = Lines("steps")
    clock[0] = 11.0
    lines.tell(3, float("inf"), ", train/kl 0.5")
    lines.tell(4, float("inf"))
    assert capsys.readouterr().err == "steps: 3, train/kl 0.5\n"


def test_a_step_without_parts_says_that_it_still_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.01)

    @waiting("the proof")
    def prove() -> int:
        time.sleep(0.2)
        return 7

    assert prove() == 7
    told = capsys.readouterr().err
    assert told.startswith("the proof: 0 s\n")
    time.sleep(0.05)
    assert capsys.readouterr().err == "", "nothing is said behind it"


def test_a_run_whose_bar_nobody_sees_has_lines(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside no bar at all, a run stays silent."""
    for bar in (object(), None):
        trainer: Any = SimpleNamespace(
            progress_bar_callback=bar, progress_bar_metrics={"train/kl": 0.25}, global_step=4,
            estimated_stepping_batches=24,
        )  # fmt: skip
        shown, module = ProgressLines(), LightningModule()
        shown.setup(trainer, module, "fit")
        shown.on_train_start(trainer, module)
        trainer.global_step = 9
        clock[0] += 20.0
        shown.on_train_batch_end(trainer, module)
        assert capsys.readouterr().err == ("steps: 5 of 20, 60 s left, train/kl 0.25\n" if bar else "")


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_counts_steps_on_a_terminal_and_is_silent_elsewhere(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A run of steps has no last epoch to count to."""
    screen, bar = io.StringIO(), ProgressBar()
    bar._console_kwargs = {"file": screen, "force_terminal": True}
    monkeypatch.setattr("src.callbacks.progress.on_terminal", lambda: terminal)
    trainer = Trainer(
        max_steps=2, callbacks=[bar], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_model_summary=False, limit_val_batches=0, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(BoringModel())
    shown = screen.getvalue()
    assert ("steps" in shown) == ("2/64" in shown or "2/2" in shown) == terminal
    assert "Epoch" not in shown
