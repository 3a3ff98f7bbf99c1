"""A run killed in the middle and resumed ends bit-equal to the uninterrupted run (CPU, float32)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from safetensors.torch import load_file

from src.cli import run
from tests.marks import slow

STEPS, SAVED, KILLED = 8, 4, 6


class Killed(Exception):
    """Stands for the signal: nothing after it runs, as after a power cut."""


class Kill(Callback):
    """Ends the process's run in the middle of a step, after the last checkpoint and off its beat."""

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, _: Any) -> None:
        if trainer.global_step == KILLED:
            raise Killed


def fit(config: str, out: Path, kill: bool = False, *extra: str, **paths: str) -> dict[str, Any]:
    """Run an experiment; return the state of its last checkpoint."""
    paths = {"model.init_args.model": paths["teacher"], "data.init_args.train": paths["corpus"],
             "data.init_args.validation": paths["corpus"]}  # fmt: skip
    arguments = [f"--{key}={value}" for key, value in paths.items()]
    arguments += [
        "--trainer.accelerator=cpu", f"--trainer.max_steps={STEPS}", "--data.init_args.batch_size=3",
        "--trainer.limit_val_batches=0", f"--trainer.logger.init_args.save_dir={out}",
        "--trainer.logger.init_args.version=run", "--trainer.enable_checkpointing=true",
    ]  # fmt: skip
    name = "lightning.pytorch.callbacks.ModelCheckpoint"
    saver = f"{{class_path: {name}, init_args: {{dirpath: {out}, filename: '{{step}}', every_n_train_steps: {SAVED}, save_top_k: -1}}}}"  # noqa: E501
    arguments.append(f"--trainer.callbacks+={saver}")
    if kill:
        arguments.append("--trainer.callbacks+=tests.integration.test_resume.Kill")
    run(["fit", "--config", config, *arguments, *extra])
    return torch.load(out / f"step={STEPS}.ckpt", weights_only=False)


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert torch.equal(one["read"], other["read"])
    assert one["state_dict"].keys() == other["state_dict"].keys()
    for key, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][key]), key
    for a, b in zip(one["optimizer_states"], other["optimizer_states"], strict=True):
        for p, moments in a["state"].items():
            for name, value in moments.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(b["state"][p][name])), name


def broken_and_resumed(config: str, out: Path, *extra: str, **paths: str) -> None:
    """Run an experiment in ``out/whole``, and killed and resumed in ``out/broken``: both end the same."""
    whole = fit(config, out / "whole", False, *extra, **paths)
    with pytest.raises(Killed):
        fit(config, out / "broken", True, *extra, **paths)
    assert not (out / "broken" / f"step={STEPS}.ckpt").exists()
    assert not list((out / "broken").rglob("mask*.json")), "nothing is written by a broken run"
    assert not list((out / "broken").rglob("record.json"))
    saved = f"--ckpt_path={out / 'broken' / f'step={SAVED}.ckpt'}"
    same(whole, fit(config, out / "broken", False, *extra, saved, **paths))


SLOW = map(slow, ("search with LoRA", "search with Scales", "recover locally"))


@pytest.mark.parametrize("stage", ["search", "recover", *SLOW])
def test_killed_and_resumed_equals_uninterrupted(
    stage: str, tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str
) -> None:
    config, extra = "configs/search/gumbel_topk.yaml", ["--model.init_args.calibration_batches=2"]
    if "recover" in stage:
        config, extra = "configs/recover/entropy_kd.yaml", [f"--model.init_args.mask={mask_file}"]
    if stage == "recover locally":
        extra += ["--config", "configs/recover/local.yaml"]
    if "with" in stage:
        pytest.importorskip("peft")
        adapters = f"src.training.adapters.{stage.split()[-1]}"
        extra.append(f"--model.init_args.adapters={{class_path: {adapters}, init_args: {{lr: 0.01}}}}")
    broken_and_resumed(config, tmp_path, *extra, teacher=teacher_dir, corpus=corpus_file)
    runs = [tmp_path / name for name in ("whole", "broken")]
    if "search" in stage:
        one, other = (next(run.rglob("mask.json")).read_bytes() for run in runs)
        assert one == other
    if "with" in stage:  # the order of a file's own notes is chance
        kept, again = (load_file(next(run.rglob("adapters.safetensors"))) for run in runs)
        assert kept.keys() == again.keys()
        assert all(torch.equal(kept[name], again[name]) for name in kept)
        whole = torch.load(tmp_path / "whole" / f"step={STEPS}.ckpt", weights_only=False)
        moments = whole["optimizer_states"][0]["state"]
        assert len(moments) > 1, "the adapters' moments are in the checkpoint, beside those of the logits"


PARTS = {
    "tail, reverse and streams": [
        *(f"--config=configs/recover/{name}.yaml" for name in ("tail", "reverse_kl", "hidden_states")),
        "--model.init_args.distillation.init_args.reverse_below=4.18",  # half of the tiny teacher's tokens
    ],
    "linear patch": ["--config=configs/recover/linear_patch.yaml"],
    "tuned scales": ["--config=configs/recover/mask_tuning.yaml"],
    "an earlier recovery": [f"--model.init_args.patch=earlier/step={STEPS}.ckpt"],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", PARTS)
def test_a_recovery_with_more_parts_resumes_bit_equal_too(
    case: str, tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str
) -> None:
    config, paths = "configs/recover/entropy_kd.yaml", {"teacher": teacher_dir, "corpus": corpus_file}
    mask = f"--model.init_args.mask={mask_file}"
    plain = fit(config, tmp_path / "earlier", False, mask, **paths)["state_dict"]
    parts = [part.replace("earlier/", f"{tmp_path}/earlier/") for part in PARTS[case]]
    broken_and_resumed(config, tmp_path, mask, *parts, **paths)
    whole = torch.load(tmp_path / "whole" / f"step={STEPS}.ckpt", weights_only=False)
    moved = [not torch.equal(weight, plain[name]) for name, weight in whole["state_dict"].items()]
    assert any(moved), "a part that did nothing would resume as well"


def test_what_the_user_asks_wins_over_the_checkpoint(
    tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str
) -> None:
    """Lightning lets hyper-parameters of a checkpoint override the command line; this project does not."""
    config, paths = "configs/recover/entropy_kd.yaml", {"teacher": teacher_dir, "corpus": corpus_file}
    mask = f"--model.init_args.mask={mask_file}"
    fit(config, tmp_path, False, mask, "--model.init_args.warmup=0.5", **paths)
    saved = tmp_path / f"step={SAVED}.ckpt"
    state = torch.load(saved, weights_only=False)
    state["hyper_parameters"] = {"_class_path": "src.recover.Recovery", "warmup": 0.5}
    torch.save(state, saved)
    fit(config, tmp_path, False, mask, f"--ckpt_path={saved}", "--model.init_args.warmup=0.25", **paths)
    import yaml

    settings = yaml.safe_load((tmp_path / "recover" / "run" / "config.yaml").read_text())
    assert settings["model"]["init_args"]["warmup"] == 0.25


def test_a_checkpoint_holds_the_student_and_no_teacher(
    tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str
) -> None:
    paths = {"teacher": teacher_dir, "corpus": corpus_file}
    mask = f"--model.init_args.mask={mask_file}"
    state = fit("configs/recover/entropy_kd.yaml", tmp_path, False, mask, **paths)["state_dict"]
    layers = {key.split(".layers.")[1].split(".")[0] for key in state if ".layers." in key}
    assert layers == {"0", "1", "2", "3"}
    assert all(key.startswith("model.") for key in state)
