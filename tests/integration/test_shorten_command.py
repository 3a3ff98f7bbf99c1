"""One command from a model and a text to a proven model and a report; killed in any stage, it goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from src.data.arithmetic import problems
from src.mask import Mask

pytestmark = pytest.mark.slow
STAGES = ["search", "recover", "cut", "export", "evaluate", "benchmark", "report"]


@pytest.fixture
def command(tmp_path: Path, teacher_dir: str) -> list[str]:
    """The command line, on a text small enough for seconds."""
    text = tmp_path / "train.jsonl"
    text.write_text("".join(json.dumps(row) + "\n" for row in problems("train", 300, 0)))
    few = "--trainer.max_steps 4 --trainer.accelerator cpu --model.init_args.calibration_batches 2"
    return [
        sys.executable, "-m", "src.cli", "shorten", "--model", teacher_dir, "--train", str(text),
        "--run", str(tmp_path / "run"), "--out", str(tmp_path / "short"), "--remove", "2", "--tokens", "20K",
        "--search", few, "--recover", "--trainer.max_steps 4 --trainer.val_check_interval 2",
    ]  # fmt: skip


def test_from_a_model_and_a_text_to_a_model_and_a_report(command: list[str], tmp_path: Path) -> None:
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    assert [
        line.partition(":")[0] for line in first.stdout.splitlines() if "python -m src.cli" in line
    ] == STAGES
    mask = Mask.load(tmp_path / "run/search/mask.json")
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "short").config.num_hidden_layers == mask.depth == 4
    )
    report = json.loads((tmp_path / "run/report.json").read_text())
    _, cut, short = report["models"]
    assert short["distinct_tokens"] >= cut["distinct_tokens"] > 0
    assert short["tokens"] > cut["tokens"]
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done already") == len(STAGES)


def test_ended_in_each_stage_it_goes_on_to_the_same_model(command: list[str], tmp_path: Path) -> None:
    for stage in STAGES[:-1]:
        running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert running.stdout is not None
        for line in running.stdout:
            if line.startswith(f"{stage}: python"):
                break
        time.sleep(1.0)
        running.send_signal(signal.SIGTERM)
        _, error = running.communicate()
        assert running.returncode == 143
        assert f"stopped in {stage}; the same command goes on" in error
        assert not (tmp_path / "short").exists() or stage in STAGES[3:]
    last = subprocess.run(command, capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    done = json.loads((tmp_path / "run/stages.json").read_text())
    assert [state for state, *_ in done.values()] == ["done"] * len(STAGES)
