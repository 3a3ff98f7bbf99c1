"""Recoveries in which feed-forwards of low weight go: found, exported, resumed, planned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from src.cli import run
from src.mask import Mask
from src.models.loading import load_model
from src.plan.experiment import Experiment
from src.plan.planner import Planner
from tests.blocks import run_by
from tests.integration.test_resume import STEPS, broken_and_resumed
from tests.planning import LAYER, PLENTY, RECOVER, write_config
from tests.tiny import save_arithmetic

OVERLAY = "configs/recover/ada_deft.yaml"
COMMANDS = [words for block in run_by("tests/integration/test_weighed_runs.py") for words in block.commands]


@pytest.fixture(scope="module")
def parent_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 4}
    return save_arithmetic(tmp_path_factory.mktemp("parent"), num_hidden_layers=6, **heads)


def given(**keys: Any) -> list[str]:
    keys = {"ratio": 0.5, "stages": 4, "until": 1.0, **keys}
    return ["--config", OVERLAY, *(f"--model.init_args.{key}={value}" for key, value in keys.items())]


@pytest.mark.slow
@pytest.mark.parametrize(("within", "gone"), [(0.2, 3), (1.0, 0)])
def test_the_commands_of_the_page_drop_what_falls_and_export_the_rest(
    within: float,
    gone: int,
    tmp_path: Path,
    parent_dir: str,
    corpus_file: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All fall alike under a strong pull: the three that may, go; or none, where the run ends too early."""
    (tmp_path / "configs").symlink_to(Path("configs").absolute())
    monkeypatch.chdir(tmp_path)
    named = {"MODEL": parent_dir, "train.jsonl": corpus_file, "held_out.jsonl": corpus_file}
    short = [*given(pull=1e9, within=within)[2:], f"--trainer.max_steps={STEPS}", "--trainer.accelerator=cpu"]
    short += ["--data.init_args.batch_size=4", "--trainer.limit_val_batches=1"]
    for words in COMMANDS:
        run([*(named.get(word, word) for word in words), *(short if words[0] == "fit" else [])])
    mask, record = Mask.load("logs/recover/ada/mask.json"), Path("logs/recover/ada/record.json")
    assert (mask.unit, mask.method, len(mask.removed)) == ("half", "Weighed", 2 * gone)
    weights = json.loads(record.read_text())["weights"]
    steps = 2 if gone else 6  # up to the stage at which as many as may have gone, or the last
    assert weights == pytest.approx([0.5 ** (steps / (within * STEPS))] * 6, abs=1e-4)
    own, theirs = (load_model(name).state_dict() for name in ("ada", parent_dir))
    for at, home in enumerate(mask.feed_forward):
        name = "model.layers.{}.mlp.down_proj.weight"
        assert own[name.format(at)].norm() < 0.8 * theirs[name.format(home)].norm(), "the model holds it"


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, parent_dir: str, corpus_file: str) -> None:
    """Saved when the weights have fallen, and some feed-forwards have gone."""
    more = given(pull=1e-3, within=0.3)
    broken_and_resumed(
        "configs/recover/entropy_kd.yaml", tmp_path, *more, teacher=parent_dir, corpus=corpus_file
    )
    runs = [tmp_path / name / "recover" / "run" for name in ("whole", "broken")]
    for name, key in (("mask.json", "keep"), ("record.json", "weights")):
        one, other = (json.loads((run / name).read_text())[key] for run in runs)
        assert one == other
    last = torch.load(tmp_path / "whole" / f"step={STEPS}.ckpt", weights_only=False)["stages"]
    assert len(set(last["weights"])) > 1, "not all fell alike"


@pytest.mark.slow
def test_a_plan_counts_the_first_stage_which_holds_the_whole(tmp_path: Path) -> None:
    argv = ["--config", RECOVER, "--config", OVERLAY, "--data.init_args.batch_size=1"]
    argv += [f"--model.init_args.model={write_config(tmp_path / 'model.json')}"]
    experiment = Experiment([*argv, "--data.init_args.max_length=64"])
    traced = Planner(experiment, PLENTY).trace()
    assert traced.trainable == traced.parent
    assert experiment.student_parameters() == traced.parent - LAYER, "at most"
