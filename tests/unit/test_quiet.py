"""Advice of libraries stays off the screen; a warning is one line; what matters is shown."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys

import pytest
from rich.table import Table

from src.command import show
from src.training.quiet import silent
from tests.faults.runs import ended

PROGRAM = """
import logging
import warnings
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from transformers.utils import logging as transformers_logging
from src.training.quiet import quieten
quieten()
rank_zero_info("💡 Tip: buy something")
rank_zero_info("GPU available: False, used: False")
rank_zero_info("the layers that go are 2 and 3")
rank_zero_warn("The 'train_dataloader' does not have many workers which may be a bottleneck.")
rank_zero_warn("data: a document was truncated.")
logging.getLogger("bitsandbytes.autograd._functions").warning("MatMul8bitLt: inputs will be cast")
warnings.warn("`isinstance(treespec, LeafSpec)` is deprecated", FutureWarning)
warnings.warn("the loss is not finite")
assert not transformers_logging.is_progress_bar_enabled()
"""


@pytest.mark.slow
def test_only_what_matters_is_shown_and_each_on_one_line() -> None:
    shown = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert (shown.stdout + shown.stderr).splitlines() == [
        "the layers that go are 2 and 3",
        "warning: data: a document was truncated.",
        "warning: the loss is not finite",
    ]


def test_a_table_is_a_title_a_heading_a_rule_and_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("model", "KL", title="one of two")
    table.add_row("cut", "0.04")
    show(table)
    title, heading, rule, row = capsys.readouterr().out.splitlines()
    assert (title.strip(), heading.split(), row.split()) == (
        "one of two",
        ["model", "┃", "KL"],
        ["cut", "│", "0.04"],
    )
    assert set(rule.strip()) == {"━", "╇"}


@pytest.mark.parametrize("width", ["30", "60", "200"])
def test_a_narrow_terminal_shows_every_figure(
    width: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as a terminal
    monkeypatch.setenv("COLUMNS", width)
    table, cells = Table(), ("logs/demo/cut", "0.0390", "160 / 0 (p 1.4e-48)")
    for heading in ("model", "KL", "lost / gained"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row(*cells)
    show(table)
    lines = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    columns = ["".join("".join(part).split()) for part in zip(*lines, strict=True)]
    assert columns == ["".join(cell.split()) for cell in cells]


def test_a_logger_is_silent_in_the_block_alone_whatever_ends_it() -> None:
    logger, other = logging.getLogger("e3.silent"), logging.getLogger("e3.other")
    logger.setLevel(logging.DEBUG)
    with contextlib.suppress(ValueError), silent("e3.silent"):
        assert not logger.isEnabledFor(logging.WARNING)
        assert logger.isEnabledFor(logging.ERROR)
        assert other.isEnabledFor(logging.WARNING)
        raise ValueError
    assert logger.level == logging.DEBUG


@pytest.mark.slow
def test_a_plan_leaves_the_loggers_as_they_were() -> None:
    names = ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero",
             "lightning.fabric.utilities.seed")  # fmt: skip
    before = {name: logging.getLogger(name).level for name in names}
    config = "configs/search/gumbel_topk.yaml"
    model = "--model.init_args.model=configs/models/qwen3-0.6b.json"
    assert ended(["plan", f"--config={config}", model, "--device=h100"]) == 0
    assert {name: logging.getLogger(name).level for name in names} == before


def test_the_filter_asks_for_beginnings_alone() -> None:
    from src.training.quiet import advice

    def record(text: str) -> logging.LogRecord:
        return logging.LogRecord("x", logging.INFO, "", 0, text, None, None)

    assert not advice(record("\n💡 Tip"))
    assert not advice(record("`Trainer(limit_val_batches=1)` was configured so 1 batch will be used."))
    assert not advice(record("Restoring states from the checkpoint path at a"))
    assert advice(record("Restored all states from the checkpoint at a"))
    assert advice(record("resume, as GPU available: says"))
