"""Every number is judged where it is taken: by constructors, by tools' options, by the parser."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from src.callbacks import PruningCurriculum, SearchMonitor, TemperatureAnnealing
from src.cli import main
from src.errors import ConfigError
from src.files import write_json
from src.losses.distill import Distillation
from src.optim import SharedAdam
from src.policies import GumbelTopK, RandomSearch
from src.pretrain import Pretrain
from src.ranges import Range, above_zero, natural, positive, ranges_of, share
from src.recover import Recovery
from src.repair.linear_patch import LinearPatch
from src.repair.mask_tuning import MaskTuning
from src.search import MaskSearch
from src.training.finite import FiniteOnly
from src.training.stage import Stage

SEARCH, RECOVER = "configs/search/gumbel_topk.yaml", "configs/recover/entropy_kd.yaml"
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("accepted", "inside", "outside"),
    [
        (positive, [1, 2**31 - 1], [0, -1, 2**31, 1.5, True, NAN, INF, "3"]),
        (natural, [0, 7], [-1, 0.5, False]),
        (share, [0, 0.5, 1], [-1e-9, 1.0000001, NAN, INF]),
        (above_zero, [1e-300, 1e30], [0, -0.0, -1, 1e300, INF, -INF, NAN]),
        (Range(float, 0, 1, open="both"), [0.5], [0, 1, NAN]),
        (Range(int, 0, 9, open="low", also=(-1,)), [-1, 1, 9], [0, -2, 10]),
    ],
)
def test_a_range_holds_what_it_says(accepted: Range, inside: list[Any], outside: list[Any]) -> None:
    assert all(value in accepted for value in inside)
    assert not any(value in accepted for value in outside)


@pytest.mark.parametrize(
    ("component", "keys"),
    [
        (Distillation, {"temperature": INF, "k": 0, "alpha": NAN, "chunk_tokens": -1}),
        (GumbelTopK, {"seed": -1, "candidates": 0, "temperature": 0.0, "init_scale": INF}),
        (GumbelTopK, {"seed": 2**32}),
        (RandomSearch, {"masks": 0, "candidates": -2}),
        (TemperatureAnnealing, {"start": 0.0, "end": NAN}),
        (PruningCurriculum, {"until": -0.1}),
        (SearchMonitor, {"every": 0}),
        (MaskSearch, {"draws": 0, "calibration_batches": -3, "ratio": 1.0}),
        (MaskSearch, {"calibration_batches": 0}),
        (Recovery, {"warmup": -0.5, "final_lr": INF, "lora_rank": 0}),
        (MaskTuning, {"ridge": -1.0, "rows": 0, "batch_size": 0}),
        (LinearPatch, {"ridge": NAN, "rows": 0, "distill_steps": -1, "lr": INF}),
    ],
)
def test_constructors_tell_all_faults_at_once(component: type, keys: dict[str, Any]) -> None:
    needed = {MaskSearch: {"model": "m", "policy": None}, Recovery: {"mask": "m"}, LinearPatch: {"data": "d"},
              MaskTuning: {"data": "d"}}  # fmt: skip
    with pytest.raises(ConfigError) as fault:
        component(**needed.get(component, {}), **keys)
    assert all(f"{key}: {value} given; accepted: {ranges_of(component)[key]}" in str(fault.value)
               for key, value in keys.items())  # fmt: skip


def test_what_is_accepted_is_built() -> None:
    assert Distillation(k=None, temperature=2, alpha=0.0, mean_entropy=None).k is None
    assert SharedAdam([torch.zeros(1)], lr=1).defaults["lr"] == 1
    with pytest.raises(ConfigError, match=r"betas: \(0.9, nan\) given"):
        SharedAdam([torch.zeros(1)], betas=(0.9, NAN))


@pytest.fixture
def told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command line that is at fault; return its one message."""

    def run(*argv: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(list(argv))
        message = capsys.readouterr().err
        assert stop.value.code == 2, message
        assert "Traceback" not in message
        assert message.count("error:") == 1
        return message[message.index("error:") :]

    return run


FIT = {
    "model.optimizer.lr": (".inf", ".nan", "-1", "0"),
    "model.draws": ("0", "-4", "1001", "99999999999999999999"),
    "model.calibration_batches": ("0", "-3"),
    "model.ratio": ("0", "1", ".nan"),
    "model.policy.init_scale": (".inf",),
    "model.policy.seed": ("-1", "4294967296"),
    "model.distillation.temperature": (".inf", "0"),
    "data.batch_size": ("0", "-1"),
    "data.max_length": ("1",),
    "data.held_out": ("1", "-0.1", ".nan"),
    "data.seed": ("-1",),
    "trainer.max_steps": ("0", "-2"),
    "trainer.accumulate_grad_batches": ("0",),
    "trainer.devices": ("-3", "0"),
    "trainer.gradient_clip_val": ("-1", ".inf"),
    "trainer.log_every_n_steps": ("0",),
    "trainer.limit_train_batches": ("0", "-1"),
    "seed_everything": ("-4", "4294967296"),
}


@pytest.mark.parametrize("number", range(max(map(len, FIT.values()))))
def test_an_experiment_names_every_key(told: Any, number: int) -> None:
    """One value of each key at once: all are told together."""
    given = {key: values[number % len(values)] for key, values in FIT.items()}
    message = told("fit", "--config", SEARCH, "--model.model=x", "--data.train=y",
                   *(f"--{key}={value}" for key, value in given.items()))  # fmt: skip
    missing = [key for key in given if f"{key}: " not in message]
    assert not missing, message


def test_a_recovery_names_every_key(told: Any) -> None:
    keys = ("model.warmup", "model.final_lr", "model.lora_rank", "model.distillation.alpha")
    message = told("fit", "--config", RECOVER, "--model.mask=m", *(f"--{key}=-1" for key in keys))
    assert all(f"{key}: -1" in message for key in keys)


def test_an_optimiser_judges_its_own(told: Any) -> None:
    argv = ("fit", "--config", SEARCH, "--model.model=x", "--model.optimizer=torch.optim.AdamW")
    assert "model.optimizer: AdamW: Invalid beta" in told(*argv, "--model.optimizer.betas=[2, 3]")
    assert "model.optimizer: AdamW: Invalid weight_decay" in told(*argv, "--model.optimizer.weight_decay=-1")


TOOLS = {
    "--ridge": ("patch --mask m --out o --data d", ("nan", "-1", "inf", "x", "")),
    "--lr": ("patch --mask m --out o --data d", ("nan", "0", "inf")),
    "--distill-steps": ("patch --mask m --out o --data d", ("-1", "1.5")),
    "--proof-tokens": ("export --mask m --out o", ("7", "-1", "nan")),
    "--limit": ("evaluate --model m --data d", ("0", "-1", "1e3", "99999999999")),
    "--threads": ("benchmark --baseline b --model m", ("0", "1000000", "nan")),
    "--batch-size": ("benchmark --baseline b --model m", ("0", "none")),
    "--disk": (f"plan --config {SEARCH}", ("nan", "inf", "-1", "many", "1e300")),
    "--tokens": (f"plan --config {SEARCH}", ("nan", "0", "5KM", "1e999")),
    "--ratio": (f"plan --config {SEARCH}", ("nan", "0", "1", "inf")),
    "--devices": (f"plan --config {SEARCH}", ("0", "-3")),
    "--rows": (f"preview --config {SEARCH}", ("0", "nan")),
}


@pytest.mark.parametrize("option", TOOLS)
def test_a_tool_names_its_option(told: Any, option: str) -> None:
    command, values = TOOLS[option]
    for value in values:
        assert f"{option}: '{value}' given; accepted: a" in told(*command.split(), f"{option}={value}")


CALLABLES = {
    "a function": "os.system",
    "one that says it makes an optimiser": "tests.faults.strangers.optimiser",
    "a class": "subprocess.Popen",
    "a module of this product": "src.losses.distill.Distillation",
}


@pytest.mark.parametrize("kind", CALLABLES)
@pytest.mark.parametrize("form", ["path", "class_path"])
def test_only_optimisers_are_called(told: Any, tmp_path: Path, kind: str, form: str) -> None:
    mark = tmp_path / "ran"
    given: Any = CALLABLES[kind]
    if form == "class_path":
        given = {"class_path": given, "init_args": {"command": f"touch {mark}"}}
    overlay = tmp_path / "evil.yaml"
    overlay.write_text(json.dumps({"model": {"init_args": {"optimizer": given}}}))
    message = told("fit", "--config", SEARCH, "--config", str(overlay), "--model.model=x", "--data.train=y")
    assert "model.optimizer" in message
    assert not mark.exists()


def test_json_holds_finite_numbers_only(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"metrics\.1\.kl is nan"):
        write_json(tmp_path / "a.json", {"metrics": [1.0, {"kl": NAN}]})
    with pytest.raises(ConfigError, match="the value is -inf"):
        write_json(tmp_path / "a.json", -INF)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def broken_teacher(tmp_path: Path, teacher_dir: str) -> str:
    """The tiny teacher with one weight that is no number."""
    path = tmp_path / "broken"
    path.mkdir()
    for file in Path(teacher_dir).iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    weights = load_file(path / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][0, 0] = NAN
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return str(path)


def test_evaluation_of_weights_that_are_no_numbers_is_an_error(
    told: Any, broken_teacher: str, teacher_dir: str, corpus_file: str, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    for teacher, model in ((teacher_dir, broken_teacher), (broken_teacher, teacher_dir)):
        argv = f"evaluate --teacher {teacher} --model {model} --data {corpus_file} --limit 4 --out {out}"
        message = told(*argv.split())
        assert broken_teacher in message
        assert "layers.2.mlp.up_proj" in message
    assert not out.exists()


def small(out: Path, corpus: str, *more: str) -> list[str]:
    return [
        "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", f"--data.train={corpus}",
        f"--data.validation={corpus}", "--data.batch_size=4", f"--trainer.logger.save_dir={out}",
        "--trainer.logger.version=v", *more,
    ]  # fmt: skip


def test_a_model_that_yields_no_numbers_is_not_trained(
    told: Any, broken_teacher: str, corpus_file: str, mask_file: str, tmp_path: Path
) -> None:
    search = ["fit", "--config", SEARCH, f"--model.model={broken_teacher}", "--trainer.max_steps=3"]
    recover = ["fit", "--config", RECOVER, f"--model.mask={mask_file}", "--trainer.max_steps=3"]
    teacher = ["--model.teacher=src.teachers.LiveTeacher", f"--model.teacher.model={broken_teacher}"]
    for argv in (search, [*recover, *teacher]):
        assert "its logits are not finite" in told(*argv, *small(tmp_path, corpus_file))
    assert not [*tmp_path.rglob("last.ckpt"), *tmp_path.rglob("record.json")]


def test_a_search_stops_at_the_step_whose_loss_is_no_number(
    told: Any, teacher_dir: str, corpus_file: str, tmp_path: Path
) -> None:
    """Logits that are lost, after a first step that was sound."""
    argv = ["fit", "--config", SEARCH, f"--model.model={teacher_dir}", "--trainer.max_steps=5",
            "--trainer.callbacks+=tests.faults.runs.Spoiled", "--model.calibration_batches=1"]  # fmt: skip
    message = told(*argv, *small(tmp_path, corpus_file))
    assert "step 1: " in message
    assert "model.optimizer.lr" in message
    assert not [*tmp_path.rglob("mask.json"), *tmp_path.rglob("last.ckpt"), *tmp_path.rglob("record.json")]


def test_every_stage_asks_for_it() -> None:
    for stage in (Stage, Pretrain):
        (callback,) = stage.configure_callbacks(cast(Any, None))
        assert isinstance(callback, FiniteOnly)


def test_the_last_good_checkpoint_stays(told: Any, corpus_file: str, mask_file: str, tmp_path: Path) -> None:
    """A step too long leaves weights beyond all numbers: neither they nor what follows is kept."""
    keys = ["--trainer.max_steps=6", "--model.optimizer=torch.optim.SGD", "--model.warmup=0",
            "--model.decay=constant", "--trainer.gradient_clip_val=null"]  # fmt: skip
    argv = ["fit", "--config", RECOVER, f"--model.mask={mask_file}", *keys]
    message = told(*argv, "--model.optimizer.lr=1e30", *small(tmp_path, corpus_file))
    assert "step " in message
    assert "is nan" in message or "not finite" in message
    for kept in tmp_path.rglob("*.ckpt"):
        state = torch.load(kept, weights_only=False)["state_dict"]
        assert all(weight.isfinite().all() for weight in state.values())
    assert not list(tmp_path.rglob("record.json"))


def test_a_key_that_needs_a_value_is_not_null(told: Any) -> None:
    keys = ("model.draws", "model.policy.init_scale", "model.dtype", "data.batch_size")
    message = told(
        "fit", "--config", SEARCH, "--model.model=x", "--data.train=y", *(f"--{key}=null" for key in keys)
    )
    assert all(f"{key}: null given" in message for key in keys)
