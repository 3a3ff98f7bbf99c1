"""Model directories that say one thing and hold another, and verbs run on them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from src.cli import main


def altered(source: str | Path, target: Path, file: str = "config.json", **changes: Any) -> Path:
    """A copy of a model directory with keys of one of its JSON files changed; None takes a key out."""
    shutil.copytree(source, target)
    settings = json.loads((target / file).read_text()) | changes
    (target / file).write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    return target


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the user is told by a verb that ends with status 2 and one message."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    told = capsys.readouterr().err
    assert stop.value.code == 2, told
    assert "Traceback" not in told
    assert told.count("error:") == 1, told
    message = told[told.index("error:") :]
    assert len(message.strip().splitlines()) <= 12, message
    return message


def search(model: Path | str, rows: str, out: Path, *more: str) -> list[str]:
    """Arguments of a short search."""
    given = {
        "model.init_args.model": model, "data.init_args.train": rows, "data.init_args.validation": rows,
        "data.init_args.batch_size": 4, "model.init_args.calibration_batches": 1, "model.init_args.draws": 1,
    }  # fmt: skip
    return _fit("configs/search/gumbel_topk.yaml", given, out, *more)


def recovery(mask: Path, rows: str, out: Path, *more: str) -> list[str]:
    """Arguments of a short recovery."""
    given = {
        "model.init_args.mask": mask, "data.init_args.train": rows, "data.init_args.validation": rows,
        "data.init_args.batch_size": 4,
    }  # fmt: skip
    return _fit("configs/recover/entropy_kd.yaml", given, out, *more)


def _fit(config: str, given: dict[str, Any], out: Path, *more: str) -> list[str]:
    given |= {
        "trainer.max_steps": 2, "trainer.accelerator": "cpu", "trainer.limit_val_batches": 1,
        "trainer.logger.init_args.save_dir": out, "trainer.logger.init_args.version": "run",
    }  # fmt: skip
    return ["fit", "--config", config, *(f"--{key}={value}" for key, value in given.items()), *more]


def crossed(cases: Sequence[Any], verbs: Sequence[str]) -> list[Any]:
    """Each case with each verb; in the ordinary run a case meets one verb, and in the slow one all."""
    return [
        pytest.param(*case, verb, marks=() if number % len(verbs) == at else pytest.mark.slow)
        for number, case in enumerate(cases)
        for at, verb in enumerate(verbs)
    ]


def command(verb: str, model: Path, mask: Path, rows: str, tmp_path: Path) -> list[str]:
    """Arguments of a verb that reads a model; what it writes is ``out``, or lies under ``logs``."""
    out, logs = str(tmp_path / "out"), str(tmp_path / "logs")
    if verb == "search":
        return search(model, rows, tmp_path / "logs")
    return {
        "export": ["export", "--mask", str(mask), "--out", out],
        "patch": ["patch", "--mask", str(mask), "--data", rows, "--out", out],
        "evaluate": ["evaluate", "--model", str(model), "--data", rows, "--out", out],
        "benchmark": ["benchmark", "--baseline", str(model), "--model", str(model), "--out", out],
        "plan": ["plan", "--config", "configs/search/gumbel_topk.yaml", f"--model.init_args.model={model}"],
        "predict": [
            *("predict", "--config", "configs/cache/topk.yaml", f"--model.init_args.model={model}"),
            *(f"--model.init_args.out={out}", f"--data.init_args.train={rows}", "--trainer.accelerator=cpu"),
            f"--trainer.logger.init_args.save_dir={logs}",
        ],
    }[verb]


VERBS = ("export", "search", "evaluate", "patch", "benchmark", "plan", "predict")
