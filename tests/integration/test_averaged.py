"""Averaged weights: the formula, training that does not notice, resumes, exports, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning import Callback, LightningModule, Trainer

from src.cli import main, run
from src.errors import ConfigError
from src.models.loading import load_model
from src.training.checkpoints import UNAVERAGED
from tests.faults.runs import ended, recovery
from tests.integration.test_resume import SAVED, STEPS, broken_and_resumed, fit

CONFIG, OVERLAY = "configs/recover/entropy_kd.yaml", ("--config", "configs/recover/averaged.yaml")
DECAY = "--trainer.callbacks.decay"


class Seen(Callback):
    """Notes the weights after each step."""

    weights: ClassVar[list[dict[str, torch.Tensor]]] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self.weights.append({name: x.detach().clone() for name, x in module.named_parameters()})


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_a_checkpoint_has_the_average_and_what_trains_does_not_notice(
    decay: float, tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str
) -> None:
    """Step by step the formula; the mean of all steps while these are few. It is exported."""
    Seen.weights.clear()
    mask = f"--model.init_args.mask={mask_file}"
    watch = "--trainer.callbacks+=tests.integration.test_averaged.Seen"
    paths = {"teacher": teacher_dir, "corpus": corpus_file}
    saved = fit(CONFIG, tmp_path / "a", False, mask, *OVERLAY, f"{DECAY}={decay}", watch, **paths)
    assert len(Seen.weights) == STEPS
    average = Seen.weights[0]
    for n, weights in enumerate(Seen.weights[1:], 2):
        share = max(1 / n, 1 - decay)
        average = {name: x + share * (weights[name] - x) for name, x in average.items()}
    if decay == 0.99:
        mean = {name: torch.stack([w[name] for w in Seen.weights]).mean(0) for name in average}
        torch.testing.assert_close(mean, average)
    torch.testing.assert_close({name: saved["state_dict"][name] for name in average}, average)
    plain = fit(CONFIG, tmp_path / "b", False, mask, **paths)
    trained = saved[UNAVERAGED]["weights"]
    assert all(torch.equal(x, plain["state_dict"][name]) for name, x in trained.items())
    assert any(not torch.equal(x, saved["state_dict"][name]) for name, x in trained.items())
    last, out = tmp_path / "a" / f"step={STEPS}.ckpt", tmp_path / "out"
    main(["export", "--mask", mask_file, "--checkpoint", str(last), "--out", str(out)])
    loaded = load_model(str(out)).state_dict()
    assert all(torch.equal(loaded[n.removeprefix("model.")], x) for n, x in saved["state_dict"].items())


def test_nothing_is_averaged_at_a_decay_of_0(
    tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str
) -> None:
    mask, paths = f"--model.init_args.mask={mask_file}", {"teacher": teacher_dir, "corpus": corpus_file}
    saved = fit(CONFIG, tmp_path, False, mask, *OVERLAY, f"{DECAY}=0", **paths)
    for name, weight in saved[UNAVERAGED]["weights"].items():
        assert torch.equal(weight, saved["state_dict"][name])


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(
    tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str
) -> None:
    extra = [f"--model.init_args.mask={mask_file}", *OVERLAY]
    broken_and_resumed(CONFIG, tmp_path, *extra, teacher=teacher_dir, corpus=corpus_file)
    whole, broken = (
        torch.load(tmp_path / name / f"step={STEPS}.ckpt", weights_only=False)[UNAVERAGED]
        for name in ("whole", "broken")
    )
    assert whole["seen"] == broken["seen"] == STEPS
    assert all(torch.equal(x, broken["weights"][name]) for name, x in whole["weights"].items())


@pytest.mark.slow
def test_an_average_begins_where_it_is_switched_on_and_is_not_taken_for_what_trains(
    tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str
) -> None:
    """From a plain checkpoint it is the mean of the steps since; a plain run does not go on from it."""
    mask, paths = f"--model.init_args.mask={mask_file}", {"teacher": teacher_dir, "corpus": corpus_file}
    fit(CONFIG, tmp_path, False, mask, **paths)
    Seen.weights.clear()
    watch = "--trainer.callbacks+=tests.integration.test_averaged.Seen"
    resumed = f"--ckpt_path={tmp_path / f'step={SAVED}.ckpt'}"
    saved = fit(CONFIG, tmp_path / "on", False, mask, *OVERLAY, watch, resumed, **paths)
    mean = {name: torch.stack([w[name] for w in Seen.weights]).mean(0) for name in Seen.weights[0]}
    assert saved[UNAVERAGED]["seen"] == len(Seen.weights) == STEPS - SAVED
    torch.testing.assert_close({name: saved["state_dict"][name] for name in mean}, mean)
    last = f"--ckpt_path={tmp_path / 'on' / f'step={STEPS}.ckpt'}"
    with pytest.raises(ConfigError, match="ckpt_path: the checkpoint's weights are an average"):
        fit(CONFIG, tmp_path / "off", False, mask, last, f"--trainer.max_steps={STEPS + 1}", **paths)
    judged = []
    for verb in ("validate", "test"):
        done = run([verb, "--config", CONFIG, *OVERLAY, mask, last, f"--model.init_args.model={teacher_dir}",
                    f"--data.init_args.validation={corpus_file}", "--trainer.accelerator=cpu",
                    f"--trainer.logger.init_args.save_dir={tmp_path / verb}"])  # fmt: skip
        judged.append(float(done.trainer.callback_metrics["val/kl"]))
    assert judged[0] == judged[1]


REFUSED = {
    "turns": (
        ["--config=configs/recover/interleaved.yaml"],
        "model: 'Interleaved' is not src.recover.Recovery",
    ),
    "strategy": (["--config=configs/strategy/fsdp2.yaml"], "strategy: 'fsdp2' shards the weights"),
    "precision": (["--trainer.precision=bf16-true"], "precision: 'bf16-true' rounds a step"),
    "sparse": (["--config=configs/recover/sparse_2_4.yaml"], "Sparsify: its zeros"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_average_is_refused_before_anything_is_loaded(
    case: str, tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("src.models.loading.load_model", None)
    more, told = REFUSED[case]
    given = recovery(tmp_path, teacher_dir, corpus_file, mask_file)
    assert ended(["fit", "--config", CONFIG, *OVERLAY, *given, *more]) == 2
    assert told in capsys.readouterr().err
