"""Every YAML under configs/ goes through the real command line and runs a few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from src.cli import run
from src.mask import Mask

CONFIGS = sorted(p for p in Path("configs").rglob("*.yaml") if p.parts[1] != "tasks")  # those: test_tasks.py
# A whole experiment states its seed; an overlay holds only what differs.
EXPERIMENTS = [p for p in CONFIGS if "seed_everything:" in p.read_text()]
SHORT = {
    "src.search.MaskSearch": {"calibration_batches": 1, "draws": 2},
    "src.recover.Recovery": {},
    "src.pretrain.Pretrain": {},
}


def arguments(config: Path, tmp_path: Path, teacher: str, corpus: str, mask: str) -> list[str]:
    """Overrides that point a shipped experiment at tiny files and make it short."""
    loaded: dict[str, Any] = yaml.safe_load(config.read_text())
    model, data = loaded["model"], loaded["data"]
    set_to: dict[str, Any] = {"trainer.accelerator": "cpu", "trainer.devices": 1}
    named = {
        "model": teacher, "tokenizer": teacher, "mask": mask, "train": corpus, "validation": corpus,
        "save_to": str(tmp_path / "saved"), "batch_size": 4, **SHORT.get(model["class_path"], {}),
    }  # fmt: skip
    for part, group in (("model", model), ("data", data)):
        for key in group["init_args"]:
            if key in named:
                set_to[f"{part}.init_args.{key}"] = named[key]
    if "architecture" in model["init_args"]:
        set_to["model.init_args.architecture.num_hidden_layers"] = 2
    if "logger" in loaded["trainer"]:
        set_to["trainer.logger.init_args.save_dir"] = str(tmp_path / "logs")
    set_to |= {"trainer.max_steps": 4, "trainer.limit_val_batches": 1, "trainer.val_check_interval": 2}
    set_to["trainer.check_val_every_n_epoch"] = "null"
    return [f"--{key}={value}" for key, value in set_to.items()]


def test_there_are_configs() -> None:
    assert {p.parts[1] for p in EXPERIMENTS} >= {"search", "recover", "demo", "teacher"}


@pytest.mark.parametrize("config", [p for p in EXPERIMENTS if p.parts[1] != "cache"], ids=str)
def test_experiment_runs(
    config: Path, tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str
) -> None:
    cli = run(
        ["fit", "--config", str(config), *arguments(config, tmp_path, teacher_dir, corpus_file, mask_file)]
    )
    loaded = yaml.safe_load(config.read_text())
    if loaded["model"]["class_path"] == "src.search.MaskSearch":
        (found,) = (tmp_path / "logs").rglob("mask.json")
        init = loaded["model"]["init_args"]
        expected = init["remove"] if "remove" in init else max(1, round(6 * init["ratio"]))
        assert len(Mask.load(found).removed) == expected
    if "StageRecord" in config.read_text():
        (record,) = (tmp_path / "logs").rglob("record.json")
        noted = json.loads(record.read_text())
        assert noted["steps"] == 4
        assert noted["metrics"] == {name: float(last) for name, last in cli.trainer.callback_metrics.items()}


@pytest.mark.parametrize("config", EXPERIMENTS, ids=str)
def test_intervals_are_counted_in_steps(config: Path) -> None:
    """A streamed corpus has no length: Lightning refuses a validation interval that is a share of it."""
    assert not isinstance(
        yaml.safe_load(config.read_text()).get("trainer", {}).get("val_check_interval"), float
    )


@pytest.mark.parametrize("config", EXPERIMENTS, ids=str)
def test_every_key_survives_parsing(config: Path) -> None:
    """A misspelt key with an empty mapping is accepted by the parser; no shipped file holds one."""

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            assert value, f"{config}: {path} is an empty mapping"
            for key, inner in value.items():
                walk(inner, f"{path}.{key}")
        for number, inner in enumerate(value if isinstance(value, list) else []):
            walk(inner, f"{path}[{number}]")

    walk(yaml.safe_load(config.read_text()), "")


@pytest.mark.parametrize("config", [p for p in CONFIGS if p not in EXPERIMENTS], ids=str)
def test_overlays_only_append_callbacks(config: Path) -> None:
    """A plain ``callbacks:`` in an overlay would silently replace those of the experiment."""
    assert "callbacks" not in yaml.safe_load(config.read_text()).get("trainer", {})


@pytest.mark.parametrize("config", ["configs/search/gumbel_topk.yaml", "configs/recover/entropy_kd.yaml"])
def test_packed_documents_train(
    config: str, tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str
) -> None:
    """Packed batches carry positions in place of an attention mask; their tokens are counted all the same."""
    path = Path(config)
    given = arguments(path, tmp_path, teacher_dir, corpus_file, mask_file)
    run(["fit", "--config", config, *given, "--data.init_args.packing=documents"])
    (record,) = (tmp_path / "logs").rglob("record.json")
    assert json.loads(record.read_text())["tokens"] > 0


def test_a_run_without_checkpoints_trains_and_heeds_signals(
    tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str
) -> None:
    path = Path("configs/recover/entropy_kd.yaml")
    given = arguments(path, tmp_path, teacher_dir, corpus_file, mask_file)
    (tmp_path / "bare.yaml").write_text("trainer: {enable_checkpointing: false, callbacks: []}\n")
    cli = run(["fit", "--config", str(path), "--config", str(tmp_path / "bare.yaml"), *given])
    assert type(cli.trainer.callbacks[-1]).__name__ == "StopOnSignal"
    assert cli.trainer.global_step > 0
    assert not list(tmp_path.rglob("*.ckpt"))


def test_one_callback_needs_no_list_beside_a_run_without_progress(
    tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str
) -> None:
    path = Path("configs/recover/entropy_kd.yaml")
    given = arguments(path, tmp_path, teacher_dir, corpus_file, mask_file)
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.callbacks=src.callbacks.StageRecord"]
    callbacks = run(["fit", "--config", str(path), *given, *quiet]).trainer.callbacks
    assert "StageRecord" in [type(callback).__name__ for callback in callbacks]
