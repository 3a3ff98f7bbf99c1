"""Recoveries that remove in turns: found, exported, resumed, planned, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lightning import Callback, LightningModule, Trainer

from src.callbacks import Sparsify
from src.cli import main
from src.errors import ConfigError
from src.losses import HiddenStates
from src.losses.objective import Weighted
from src.mask import Mask
from src.models.loading import load_model
from src.plan.experiment import Experiment
from src.plan.planner import Planner
from src.repair.linear_patch import LinearPatch
from src.training.interleaved import Interleaved
from src.training.schedules import warmup_decay
from src.training.strategies import FSDP2
from tests.faults.runs import ended
from tests.integration.test_resume import SAVED, STEPS, broken_and_resumed, fit, same
from tests.planning import LAYER, MLP, PLENTY, RECOVER, H, L, write_config
from tests.tiny import save_arithmetic

OVERLAY = "configs/recover/interleaved.yaml"
UNITS = ("layer", "half", "channel", "kv_group")


@pytest.fixture(scope="module")
def parent_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny decoder of six layers with four KV groups in each."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 4}
    return save_arithmetic(tmp_path_factory.mktemp("parent"), num_hidden_layers=6, **heads)


def given(unit: str, **keys: Any) -> list[str]:
    keys = {"unit": unit, "ratio": "0.5", "stages": 4, "until": 1.0, "amplitude": 0.3, **keys}
    return ["--config", OVERLAY, *(f"--model.init_args.{key}={value}" for key, value in keys.items())]


class Watch(Callback):
    """Sees at each step the rate, what is left, and how many numbers train."""

    seen: list[tuple[float, int, int]] = []  # noqa: RUF012

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        recovery, (group,) = cast(Interleaved, module), trainer.optimizers[0].param_groups
        Watch.seen.append((group["lr"], len(recovery.kept), sum(p.numel() for p in group["params"])))


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS)
def test_units_go_stage_by_stage_and_the_end_is_exported(
    unit: str, tmp_path: Path, parent_dir: str, corpus_file: str
) -> None:
    Watch.seen.clear()
    watch = "--trainer.callbacks+=tests.integration.test_interleaved_runs.Watch"
    config = "configs/recover/entropy_kd.yaml"
    last = fit(config, tmp_path, False, *given(unit), watch, teacher=parent_dir, corpus=corpus_file)
    rates, left, numbers = zip(*Watch.seen, strict=True)
    assert list(rates) == pytest.approx([7e-4 * warmup_decay(i / 8, 0.05, 0.02, "cosine") for i in range(8)])
    mask_file = tmp_path / "recover" / "run" / "mask.json"
    mask = Mask.load(mask_file)
    assert (mask.unit, mask.method) == (unit, "Interleaved")
    assert left[-1] == len(mask.keep) == mask.units // 2
    assert list(left) == sorted(left, reverse=True)
    assert len(set(left)) > 2, "not all at once"
    assert left[0::2] == left[1::2], "two steps between removals"
    assert numbers[-1] < numbers[0]
    steps = [int(state["step"]) for state in last["optimizer_states"][0]["state"].values()]
    assert set(steps) == {STEPS}, "no moment began anew"
    stages = json.loads((tmp_path / "recover" / "run" / "record.json").read_text())["stages"]
    assert [(stage["step"], stage["units"]) for stage in stages] == [(i, left[i]) for i in range(0, 8, 2)]
    checkpoint, out = tmp_path / f"step={STEPS}.ckpt", tmp_path / "out"
    main(["export", "--mask", str(mask_file), "--checkpoint", str(checkpoint), "--out", str(out)])
    loaded = load_model(str(out)).state_dict()
    weights = {name.removeprefix("model."): tensor for name, tensor in last["state_dict"].items()}
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS)
def test_killed_and_resumed_equals_uninterrupted(
    unit: str, tmp_path: Path, parent_dir: str, corpus_file: str
) -> None:
    """Saved between the second and the third of four removals, while layers are of different widths."""
    more = given(unit, stages=5)
    broken_and_resumed(
        "configs/recover/entropy_kd.yaml", tmp_path, *more, teacher=parent_dir, corpus=corpus_file
    )
    one, other = (tmp_path / name / "recover" / "run" / "mask.json" for name in ("whole", "broken"))
    assert one.read_text() == other.read_text()
    if unit in ("kv_group", "channel"):
        saved = torch.load(tmp_path / "broken" / f"step={SAVED}.ckpt", weights_only=False)
        assert len(saved["stages"]["kept"]) < len(saved["recovery"]["keep"]), "some are closed by gates"


@pytest.mark.slow
def test_scores_are_those_of_the_present_student(
    tmp_path: Path, parent_dir: str, corpus_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from src.training.interleaved import block_influence

    seen: list[tuple[int, float]] = []

    def spied(student: Any, *rest: Any) -> torch.Tensor:
        seen.append((len(student.model.layers), float(student.model.norm.weight.sum())))
        return block_influence(student, *rest)

    monkeypatch.setattr("src.training.interleaved.block_influence", spied)
    fit(
        "configs/recover/entropy_kd.yaml", tmp_path, False, *given("layer", stages=3), teacher=parent_dir,
        corpus=corpus_file,
    )  # fmt: skip
    assert [layers for layers, _ in seen] == [6, 5, 4]
    assert len({weight for _, weight in seen}) == 3, "it has trained between the scores"


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["half", "channel"])
def test_terms_read_the_student_of_the_moment(
    unit: str, tmp_path: Path, parent_dir: str, corpus_file: str
) -> None:
    """Streams of the layers that are left, and what enters their down projections."""
    more = [*given(unit), "--config=configs/recover/density.yaml"]
    term = "{term: {class_path: src.losses.HiddenStates}, weight: 1.0}"
    more.append(f"--model.init_args.terms+={term}")
    fit("configs/recover/entropy_kd.yaml", tmp_path, False, *more, teacher=parent_dir, corpus=corpus_file)
    mask = Mask.load(tmp_path / "recover" / "run" / "mask.json")
    assert len(mask.keep) == mask.units // 2


@pytest.mark.slow
def test_activations_that_are_recomputed_meet_the_same_gates(
    tmp_path: Path, parent_dir: str, corpus_file: str
) -> None:
    config, keys = "configs/recover/entropy_kd.yaml", {"teacher": parent_dir, "corpus": corpus_file}
    plain, again = (
        fit(config, tmp_path / str(asked), False, *given("channel", checkpoint_activations=asked), **keys)
        for asked in ("false", "true")
    )
    same(plain, again)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["layer", "channel"])
def test_it_learns_from_a_cache(unit: str, tmp_path: Path, parent_dir: str, corpus_file: str) -> None:
    cache = tmp_path / "cache"
    quick = ["--trainer.accelerator=cpu", f"--trainer.logger.init_args.save_dir={tmp_path}"]
    quick += [f"--model.init_args.model={parent_dir}", f"--data.init_args.tokenizer={parent_dir}"]
    text = [f"--data.init_args.train={corpus_file}", f"--model.init_args.out={cache}"]
    main(["predict", "--config", "configs/cache/topk.yaml", *quick, *text])
    configs = ("configs/recover/entropy_kd.yaml", "configs/cache/recover.yaml", OVERLAY)
    argv = [word for config in configs for word in ("--config", config)]
    argv += ["--data.init_args.batch_size=4", f"--data.init_args.train={cache}", "--trainer.max_steps=6"]
    main(["fit", *argv, *quick, f"--model.init_args.unit={unit}", "--trainer.limit_val_batches=0"])
    (found,) = tmp_path.rglob("mask.json")
    assert len(Mask.load(found).removed) == {"layer": 2, "channel": 36}[unit]


def test_a_mask_says_how_many_and_not_which(
    tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str
) -> None:
    more = given("layer", mask=mask_file, ratio="null", stages=2)
    fit("configs/recover/entropy_kd.yaml", tmp_path, False, *more, teacher=teacher_dir, corpus=corpus_file)
    found = Mask.load(tmp_path / "recover" / "run" / "mask.json")
    assert len(found.removed) == len(Mask.load(mask_file).removed) == 2
    assert found.fingerprint is not None


TERM = Weighted(HiddenStates(layers=[1]), 1.0)
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "lora": ({"scope": "lora"}, {}, "model.scope: 'lora' trains a part"),
    "patch": ({"patch": LinearPatch(data="rows")}, {}, "model.patch: it repairs a cut"),
    "closing": ({"closing": 0.5}, {}, "model.closing: units go stage by stage"),
    "strategy": ({}, {"strategy": FSDP2()}, "'fsdp2' shards the student"),
    "half precision": ({}, {"precision": "bf16-true"}, "'bf16-true' rounds the weights"),
    "steps": ({}, {"max_steps": 4}, "trainer.max_steps: 4 given, and 5 stages need one each"),
    "sparse": ({}, {"callbacks": [Sparsify()]}, "Sparsify masks what is to go"),
    "nothing": ({"ratio": None}, {}, "give exactly one of model.mask"),
    "both": ({"remove": 2}, {}, "give exactly one of model.mask"),
    "all": ({"ratio": None, "remove": 6}, {}, "6 of 6 would go; accepted: 1 to 5"),
    "until": ({"until": 0.0}, {}, "until: 0.0 given; accepted: a number above 0 and at most 1"),
    "term": ({"terms": [TERM]}, {}, "layers: [1] given, which are not layers that the mask keeps"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_go_in_turns_is_refused_before_anything_is_loaded(case: str, teacher_dir: str) -> None:
    keys, others, told = REFUSED[case]
    settings = {"accelerator": "cpu", "max_steps": 8, "logger": False, "enable_checkpointing": False}
    with pytest.raises(ConfigError) as refusal:
        Interleaved(teacher_dir, **{"ratio": 0.25, **keys}).refuse(Trainer(**{**settings, **others}), None)
    assert told in str(refusal.value)


def test_a_run_that_tokens_end_is_refused(
    tmp_path: Path, teacher_dir: str, corpus_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["fit", "--config", "configs/recover/entropy_kd.yaml", "--config", OVERLAY]
    argv += [f"--model.init_args.model={teacher_dir}", f"--data.init_args.train={corpus_file}"]
    argv += ["--trainer.accelerator=cpu", f"--trainer.logger.init_args.save_dir={tmp_path}"]
    assert ended([*argv, "--data.init_args.max_tokens=2000"]) == 2
    text = capsys.readouterr().err
    assert text.count("error:") == 1
    assert "data.max_tokens: it may end the run too early" in text
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("unit", ["layer", pytest.param("channel", marks=pytest.mark.slow)])
def test_a_plan_counts_the_first_stage_which_holds_the_whole(unit: str, tmp_path: Path) -> None:
    argv = ["--config", RECOVER, "--config", OVERLAY, f"--model.init_args.unit={unit}"]
    argv += [
        f"--model.init_args.model={write_config(tmp_path / 'model.json')}",
        "--data.init_args.batch_size=1",
    ]
    experiment = Experiment([*argv, "--data.init_args.max_length=64"])
    planner = Planner(experiment, PLENTY)
    traced = planner.trace()
    assert traced.trainable == traced.parent
    assert planner.configured.parts["optimiser"] >= 2 * 4 * traced.parent
    gone = LAYER if unit == "layer" else L * (MLP // 4) * 3 * H
    assert experiment.student_parameters() == traced.parent - gone
