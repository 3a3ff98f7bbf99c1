"""Run the command line in processes of its own, on one rank or two, and read what the ranks wrote down."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from subprocess import PIPE
from typing import Any

CONFIGS = {
    "search": "configs/search/gumbel_topk.yaml",
    "recover": "configs/recover/entropy_kd.yaml",
    "prompts": "configs/prompts/distilled_calibration.yaml",
}
STEPS = 50
LIMIT = 600.0
"""Seconds of one command; alone on two cores each takes less than 60."""


class Bench:
    """Tiny files, and runs on them.

    Args:
        out: directory of all runs.
        teacher: directory of the model.
        corpus: JSONL.
        mask: mask of the model.
    """

    def __init__(self, out: Path, teacher: str, corpus: str, mask: str) -> None:
        self.out, self.teacher, self.corpus, self.mask = out, teacher, corpus, mask

    def fit(self, name: str, stage: str, overlay: str, ranks: int, **extra: Any) -> Path:
        """Train, and return the directory of the run; it must end well."""
        done = self.start(name, stage, overlay, ranks, **extra)
        assert done.returncode == 0, done.stderr[-3000:]
        return self.out / name

    def start(
        self, name: str, stage: str, overlay: str, ranks: int, **extra: Any
    ) -> subprocess.CompletedProcess[str]:
        """Train with the same global batches on any number of ranks; return the ended process."""
        model = {"draws": 2, "calibration_batches": 2} if stage == "search" else {"mask": self.mask}
        keys = {
            "data": "tests.distributed.rows.GlobalRows",
            "data.init_args.train": self.corpus,
            "data.init_args.tokenizer": self.teacher,
            "data.init_args.batch_size": 8,
            "model.init_args.model": self.teacher,
            **{f"model.init_args.{key}": value for key, value in model.items()},
            "trainer.max_steps": STEPS,
            "trainer.limit_val_batches": 0,
            "trainer.logger.init_args.save_dir": self.out / name,
            "trainer.logger.init_args.version": "run",
        }
        callbacks = [f"tests.distributed.rows.Diary={{directory: {self.out / name}}}"]
        callbacks += extra.pop("callbacks", [])
        ways = {key: extra.pop(key) for key in ("torchrun", "program") if key in extra}
        verb = ["fit", "--config", CONFIGS[stage]]
        return self.command(verb, overlay, ranks, {**keys, **extra}, callbacks, **ways)

    def command(
        self,
        verb: list[str],
        overlay: str,
        ranks: int,
        keys: dict[str, Any],
        callbacks: Sequence[str] = (),
        torchrun: bool = False,
        program: str = "src.cli",
    ) -> subprocess.CompletedProcess[str]:
        """Run one command line, and all processes that it starts, to the end."""
        given = [*verb, "--config", f"configs/strategy/{overlay}.yaml"]
        given += ["--trainer.accelerator=cpu", f"--trainer.devices={ranks}", "--trainer.precision=32-true"]
        given += [f"--{key.replace('__', '.')}={value}" for key, value in keys.items()]
        for callback in callbacks:
            path, _, arguments = callback.partition("=")
            given.append(f"--trainer.callbacks+={{class_path: {path}, init_args: {arguments or '{}'}}}")
        agent = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        start = [sys.executable, *(agent if torchrun else []), "-m", program]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        for key in ("LOCAL_RANK", "MASTER_PORT", "WORLD_SIZE", "NODE_RANK"):
            environment.pop(key, None)
        return in_a_group([*start, *given], environment)


def in_a_group(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; if it does not end in time, none of the ranks that it started outlives it."""
    with subprocess.Popen(
        command, stdout=PIPE, stderr=PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(command, process.returncode, out, err)


def diary(run: Path, rank: int = 0) -> list[dict[str, Any]]:
    """The steps that a rank wrote down."""
    return json.loads((run / f"{rank}.json").read_text())


def drift(one: list[dict[str, Any]], other: list[dict[str, Any]], key: str) -> tuple[float, float]:
    """The largest and the mean absolute difference of what two runs wrote under ``key``, over all steps."""
    assert len(one) == len(other)
    gaps = [
        abs(a - b)
        for x, y in zip(one, other, strict=True)
        for a, b in zip(_list(x[key]), _list(y[key]), strict=True)
    ]
    return max(gaps), sum(gaps) / len(gaps)


def _list(value: float | list[float]) -> list[float]:
    return value if isinstance(value, list) else [value]


def saver(directory: Path, every: int) -> str:
    """A callback that keeps a checkpoint of every so many steps."""
    keys = f"dirpath: {directory}, filename: '{{step}}', every_n_train_steps: {every}, save_top_k: -1"
    return f"lightning.pytorch.callbacks.ModelCheckpoint={{{keys}}}"
