"""A short search or recovery that another run resumes, or that an export reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from src.cli import main

STEPS = 2
CONFIGS = {"search": "configs/search/gumbel_topk.yaml", "recover": "configs/recover/entropy_kd.yaml"}


def copy(source: str, target: Path) -> str:
    """The same bytes under another name."""
    shutil.copytree(source, target) if Path(source).is_dir() else shutil.copyfile(source, target)
    return str(target)


class Run:
    """A search or a recovery of two steps that another one resumes."""

    def __init__(self, stage: str, out: Path, model: str, corpus: str, **settings: str) -> None:
        self.out = out
        base = {
            "model.init_args.model": model, "data.init_args.train": corpus,
            "data.init_args.validation": corpus, "data.init_args.batch_size": "3",
            "trainer.accelerator": "cpu", "trainer.limit_val_batches": "0",
            "trainer.max_steps": str(STEPS), "trainer.logger.init_args.save_dir": str(out),
            "trainer.logger.init_args.version": "run", "trainer.enable_progress_bar": "false",
        }  # fmt: skip
        if stage == "search":
            base |= {"model.init_args.calibration_batches": "1", "model.init_args.draws": "2",
                     "model.init_args.policy.init_args.candidates": "1",
                     "model.init_args.policy.init_args.polish": "false"}  # fmt: skip
        self.arguments = ["fit", "--config", CONFIGS[stage]]
        saver = {"class_path": "src.callbacks.LastCheckpoint",
                 "init_args": {"every_n_train_steps": 1, "save_last": True, "dirpath": str(out)}}  # fmt: skip
        callbacks = [saver, *([{"class_path": "src.callbacks.HardenMask"}] if stage == "search" else [])]
        self.settings = {**base, **settings, "trainer.callbacks": json.dumps(callbacks)}
        self.checkpoint = str(out / "last.ckpt")

    def fit(self, **changes: str) -> None:
        main([*self.arguments, *(f"--{key}={value}" for key, value in {**self.settings, **changes}.items())])

    def resume(self, **changes: str) -> None:
        self.fit(**{"ckpt_path": self.checkpoint, "trainer.max_steps": str(STEPS + 1), **changes})


def key(name: str) -> str:
    return f"model.init_args.{name}"
