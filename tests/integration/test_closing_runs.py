"""A recovery that closes removed units slowly: resumed, exported, planned, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lightning import Callback, LightningModule, Trainer

from src.cli import main
from src.mask import Mask
from src.models.loading import load_model
from src.recover import Recovery
from tests.faults.runs import ended, recovery
from tests.integration.test_resume import STEPS, broken_and_resumed, fit
from tests.planning import LAYER, RECOVER, D, planner_of

CONFIG, OVERLAY = "configs/recover/entropy_kd.yaml", ("--config", "configs/recover/closing.yaml")


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(
    tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str
) -> None:
    """Saved while the units close, killed after it."""
    extra = [f"--model.init_args.mask={mask_file}", *OVERLAY, "--model.init_args.closing=0.7"]
    broken_and_resumed(CONFIG, tmp_path, *extra, teacher=teacher_dir, corpus=corpus_file)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["layer", "half"])
def test_the_gates_fall_in_time_and_the_cut_is_exported(
    unit: str, tmp_path: Path, teacher_dir: str, corpus_file: str
) -> None:
    keep = (0, 2, 3, 5) if unit == "layer" else (0, 1, 2, 5, 6, 7, 10, 11)
    mask = tmp_path / "mask.json"
    Mask(teacher_dir, 6, keep, "test", unit="layer" if unit == "layer" else "half").save(mask)
    watch = "--trainer.callbacks+=tests.integration.test_closing_runs.Watch"
    Watch.seen.clear()
    fit(CONFIG, tmp_path, False, f"--model.init_args.mask={mask}", *OVERLAY, watch, teacher=teacher_dir,
        corpus=corpus_file)  # fmt: skip
    assert Watch.seen == pytest.approx([0.75, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0, 0.0])
    checkpoint, out = tmp_path / f"step={STEPS}.ckpt", tmp_path / "out"
    main(["export", "--mask", str(mask), "--checkpoint", str(checkpoint), "--out", str(out)])
    trained = torch.load(checkpoint, weights_only=False)["state_dict"]
    loaded = load_model(str(out)).state_dict()
    assert all(torch.equal(loaded[name.removeprefix("model.")], tensor) for name, tensor in trained.items())


REFUSED = {
    "lora": (["--model.init_args.scope=lora"], "model.scope 'lora' puts adapters"),
    "patch": (
        ["--model.init_args.patch={class_path: src.linear_patch.LinearPatch, init_args: {data: rows}}"],
        "model.patch repairs a cut",
    ),
    "range": (["--model.init_args.closing=1.5"], "closing: 1.5 given; accepted: a number from 0 to 1"),
    "strategy": (["--config=configs/strategy/fsdp2.yaml"], "strategy 'fsdp2' shards the student"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_close_slowly_is_refused_before_anything_is_loaded(
    case: str, tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("src.models.loading.load_model", None)
    more, told = REFUSED[case]
    given = recovery(tmp_path, teacher_dir, corpus_file, mask_file)
    assert ended(["fit", "--config", CONFIG, *OVERLAY, *given, *more]) == 2
    text = capsys.readouterr().err
    assert text.count("error:") == 1
    assert told in text


def test_a_plan_counts_the_units_that_still_run(tmp_path: Path) -> None:
    """The removed layer's weights and the buffers of a second rotary embedding; the operations of a layer."""
    few = {"data.init_args.batch_size": 1}
    plain = planner_of(tmp_path, RECOVER, **few).trace()
    slow = planner_of(tmp_path, RECOVER, **few, **{"model.init_args.closing": 0.5}).trace()
    assert slow.peak["student"] - plain.peak["student"] == 4 * (LAYER + 2 * D // 2)
    assert (slow.trainable, slow.peak["optimiser"]) == (plain.trainable, plain.peak["optimiser"])
    assert slow.flops > plain.flops
    assert slow.teacher_flops == plain.teacher_flops


class Watch(Callback):
    """Sees how open the removed units are at each step."""

    seen: list[float] = []  # noqa: RUF012

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        recovery = cast(Recovery, module)
        Watch.seen.append(recovery.opened.gate if recovery.opened else 0.0)
