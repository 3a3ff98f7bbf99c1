"""Long steps say how far they are: lines where no terminal is, nothing of quick ones, one rank alone."""

from __future__ import annotations

import io
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rich
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities import rank_zero_only

from src.callbacks import ProgressBar, ProgressLines
from src.training import progress
from src.training.progress import Lines, track, waiting
from src.training.quiet import Screen, advice


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


def test_lines_of_a_longer_step_are_rarer_and_never_more_than_ten_minutes_apart(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in track(range(3000), "masks"):
        clock[0] += 1.0
    told = [int(line.split()[1]) for line in capsys.readouterr().err.splitlines()]
    assert told == [10, 40, 70, 105, 158, 237, 356, 534, 801, 1202, 1802, 2402]


def test_a_quick_step_has_none(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(range(100), "masks")) == list(range(100))
    assert capsys.readouterr().err == ""


def remains(shown: str) -> list[str]:
    """The lines that stay on a terminal to which ``shown`` is written; colours are left out."""
    rows, at = [""], 0
    for part in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", shown):
        if part == "\n":
            at += 1
            rows += [""] * (at == len(rows))
        elif up := re.fullmatch(r"\x1b\[(\d+)A", part):
            at -= int(up.group(1))
        elif part == "\x1b[2K":
            rows[at] = ""
        elif part[0] not in "\x1b\r":
            rows[at] += part
    return [row for row in rows if row]


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What a person sees on a terminal."""
    file, console = io.StringIO(), rich.get_console()
    monkeypatch.setattr("src.training.progress.on_terminal", lambda: True)
    monkeypatch.setattr("src.callbacks.progress.on_terminal", lambda: True)
    own = dict(console.__dict__)
    rich.reconfigure(file=file, force_terminal=True, width=120)
    yield file
    console.__dict__ = own


def test_a_terminal_has_a_bar_that_leaves_nothing(
    screen: io.StringIO, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "REDRAWN", 0.0)
    assert list(track(iter("abc"), "[letters]", 3)) == ["a", "b", "c"]
    assert "[letters]" in screen.getvalue()
    assert "2/3" in screen.getvalue()
    assert remains(screen.getvalue()) == []
    assert capsys.readouterr().err == ""


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


def test_a_step_without_parts_leaves_nothing_on_a_terminal(screen: io.StringIO) -> None:
    with waiting("the proof"):
        pass
    assert "the proof" in screen.getvalue()
    assert remains(screen.getvalue()) == []


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
        assert capsys.readouterr().err == ("steps: 9 of 24, 60 s left, train/kl 0.25\n" if bar else "")


class AtTheEnd(Callback):
    """Works when the run is over, as the choice of the best mask does, and tells what it found."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert list(track(range(3), "swaps")) == [0, 1, 2]
        logging.getLogger("lightning.pytorch").info("the mask keeps 3 of 4")


def boring(steps: int, tmp_path: Path, bar: ProgressBar, model: BoringModel | None = None) -> None:
    trainer = Trainer(
        max_steps=steps, callbacks=[AtTheEnd(), bar], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_model_summary=False, limit_train_batches=2, limit_val_batches=0,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model or BoringModel())


def test_one_bar_counts_all_steps_and_what_runs_under_it_leaves_only_its_message(
    screen: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "REDRAWN", 0.0)
    told = Screen()
    told.addFilter(advice)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "handlers", [told])
    bar = ProgressBar()
    bar._console_kwargs = {"file": screen, "force_terminal": True, "width": 120}
    boring(5, tmp_path, bar)
    assert "swaps" in screen.getvalue()
    message, steps = remains(screen.getvalue())
    assert message == "the mask keeps 3 of 4"
    assert "steps" in steps
    assert "5/5" in steps


class ManyFigures(BoringModel):
    """Logs more figures than a line of a terminal holds."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log_dict({f"train/f{i}": float(i) for i in range(8)}, prog_bar=True)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(("width", "figures"), [(80, 1), (110, 1), (140, 3)])
def test_a_bar_stays_on_one_line_and_shows_the_figures_that_fit(
    screen: io.StringIO, tmp_path: Path, width: int, figures: int
) -> None:
    bar = ProgressBar()
    bar._console_kwargs = {"file": screen, "force_terminal": True, "width": width}
    boring(3, tmp_path, bar, ManyFigures())
    (line,) = (line for line in remains(screen.getvalue()) if "steps" in line)
    assert re.findall(r"f(\d): \1\.000", line) == [str(i) for i in range(figures)]
    assert len(line.rstrip()) <= width


def test_elsewhere_a_run_has_no_bar(tmp_path: Path) -> None:
    """A bar that is no terminal's is a heap of its states."""
    shown, bar = io.StringIO(), ProgressBar()
    bar._console_kwargs = {"file": shown, "force_terminal": True}
    boring(2, tmp_path, bar)
    assert shown.getvalue() == ""
