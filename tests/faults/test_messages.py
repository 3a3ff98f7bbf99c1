"""A fault of an experiment's file or key is one line that names it, with status 2, before anything loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from src.cli import main
from src.training.parse_faults import in_short

SEARCH, RECOVER = "configs/search/gumbel_topk.yaml", "configs/recover/entropy_kd.yaml"


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Run a command line that is at fault; return its message of one line."""

    def run(*argv: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(list(argv))
        told = capsys.readouterr().err
        error = told[told.index("error:") :].strip()
        assert stop.value.code == 2, error
        assert len(error.splitlines()) == 1, error
        assert len(error) < 600, error
        assert not any(word in error for word in ("Union subtypes", "NestedArg", "Parser key", "<class")), (
            error
        )
        return error

    return run


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.draws=many", "model.draws: 'many' given; accepted: a whole number"),
        ("--model.policy.form=hard", "model.policy.form: 'hard' given; accepted: 'softmax', 'successive'"),
        ("--model.policy.init_args.temperature=x", "model.policy.temperature: 'x' given; accepted: a number"),
        ("--model.distillation.k=x", "model.distillation.k: 'x' given; accepted: a whole number or null"),
        (
            "--model.policy.tempratur=1",
            "model.policy: there is no key 'tempratur'. Did you mean 'temperature'?",
        ),
        ("--model.policy=Nope", "model.policy: 'Nope' given; accepted: the class_path"),
        ("--model.policy=src.policies.base.MaskPolicy", "MaskPolicy is abstract"),
        ("--model.adapters={}", "model.adapters: Not a valid subclass of Adapters"),
        (
            "--trainer.precision=99",
            "trainer.precision: '99' given; accepted: 64, 32, 16 or 'transformer-engine'",
        ),
        ("--trainer.logger=Nope", "trainer.logger: 'Nope' given"),
        (
            "--trainer.logger.filename_suffix=null",
            "trainer.logger.filename_suffix: None given; accepted: text",
        ),
        ("--trainer.logger.max_queue=null", "trainer.logger.max_queue: None given; accepted: a whole number"),
        ("--trainer.logger.filename_suffix=[1]", "trainer.logger.filename_suffix: [1] given; accepted: text"),
        ("--model.optimizer.lr=x", "model.optimizer.lr: 'x' given; accepted: a number"),
        ("--data.batch_size=[1]", "data.batch_size: '[1]' given; accepted: a whole number"),
        ("--trainer.max_stesp=3", "Did you mean 'trainer.max_steps'?"),
        (
            "--trainer.callbacks+={class_path: src.callbacks.LastCheckpoint, init_args: {monitor: ''}}",
            "monitor: '' given; accepted: a name, or null",
        ),
    ],
)
def test_the_one_line_that_matters(told: Any, option: str, message: str) -> None:
    assert message in told("fit", "--config", SEARCH, "--model.model=x", "--data.train=y", option)


def test_a_run_that_is_refused_late_leaves_nothing_and_uses_up_no_version(
    told: Any, tmp_path: Path, teacher_dir: str, corpus_file: str
) -> None:
    """The column shows itself when rows are read; a directory that was there stays."""
    argv = ["fit", "--config", SEARCH, f"--model.model={teacher_dir}", f"--data.train={corpus_file}"]
    argv += [f"--trainer.logger.save_dir={tmp_path}", "--trainer.accelerator=cpu"]
    twice = "more than one stateful callback of type `StageRecord`"
    assert twice in told(*argv, "--trainer.callbacks+=src.callbacks.StageRecord")
    told(*argv, "--data.columns.text=nowhere")
    assert list(tmp_path.rglob("*")) == [tmp_path / "search"]
    (tmp_path / "search" / "version_0").mkdir()
    told(*argv, "--data.columns.text=nowhere", "--trainer.logger.version=0")
    assert (tmp_path / "search" / "version_0").is_dir()


@pytest.mark.parametrize("out", ["", ".", "{0}", "{0}/file/below", "/dev/null/below"])
def test_where_no_file_can_be_written_is_told_before_any_work(told: Any, tmp_path: Path, out: str) -> None:
    (tmp_path / "file").touch()
    at = out.format(tmp_path)
    for argv in (
        ["evaluate", "--model=none", "--data=none", f"--out={at}"],
        ["benchmark", "--model=none", "--baseline=none", f"--out={at}"],
        ["plan", "--config", SEARCH, f"--json={at}"],
    ):
        message = told(*argv)
        assert f"'{at}' given; " in message
        assert "director" in message


@pytest.mark.parametrize("callback", ["StageRecord", "HardenMask"])
def test_a_callback_that_could_not_write_its_file_stops_the_run_before_it_learns(
    told: Any, callback: str, tmp_path: Path, teacher_dir: str, corpus_file: str
) -> None:
    argv = ["fit", "--config", SEARCH, f"--model.model={teacher_dir}", f"--data.train={corpus_file}"]
    argv += [f"--trainer.logger.save_dir={tmp_path}", "--trainer.accelerator=cpu"]
    alone = f"[{{class_path: src.callbacks.{callback}, init_args: {{path: .}}}}]"
    message = told(*argv, f"--data.validation={corpus_file}", f"--trainer.callbacks={alone}")
    assert f"{callback}: path: '.' given; it is a directory" in message
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_what_is_no_nested_report_stays() -> None:
    assert in_short("unrecognized arguments: --x") == "unrecognized arguments: --x"
    nested = (
        'Parser key "a":\n  Problem with given class_path \'B\':\n    Parser key "c":\n'
        "      Expected a <class 'int'>. Got value: x"
    )
    assert in_short(nested) == "a.c: 'x' given; accepted: a whole number."


@pytest.mark.parametrize("more", [(), ("--ckpt_path=last",)])
def test_an_experiment_that_is_missing_is_asked_for_by_its_option(told: Any, more: tuple[str, ...]) -> None:
    assert "--config: no experiment given; accepted: a YAML file that names a model" in told("fit", *more)


def test_an_overlay_follows_its_experiment(told: Any) -> None:
    for overlay in (
        "configs/policy/sleb.yaml",
        "configs/strategy/ddp.yaml",
        "configs/recover/interleaved.yaml",
    ):
        message = told("fit", "--config", overlay, "--config", SEARCH)
        assert f"Give the experiment first: --config {SEARCH} --config {overlay}" in message


def test_a_logger_that_is_not_installed(
    told: Any, tmp_path: Path, teacher_dir: str, corpus_file: str
) -> None:
    argv = ["fit", "--config", SEARCH, f"--model.model={teacher_dir}", f"--data.train={corpus_file}"]
    for logger in ("CometLogger", "MLFlowLogger"):
        assert "not installed" in told(*argv, f"--trainer.logger=lightning.pytorch.loggers.{logger}")


def run(tmp_path: Path, teacher: str, corpus: str, *more: str) -> None:
    main(["fit", "--config", SEARCH, f"--model.model={teacher}", f"--data.train={corpus}",
          f"--data.validation={corpus}", "--data.batch_size=4", "--model.calibration_batches=1",
          f"--trainer.logger.save_dir={tmp_path}", "--trainer.logger.version=v", "--trainer.max_steps=2",
          "--trainer.accelerator=cpu", *more])  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        ("--trainer.precision=bf16-true",),
        ("--model.distillation.k=null",),
        ("--model.distillation.init_args.k=null", "--trainer.enable_progress_bar=false"),
    ],
)
def test_what_must_work(tmp_path: Path, teacher_dir: str, corpus_file: str, options: tuple[str, ...]) -> None:
    run(tmp_path, teacher_dir, corpus_file, *options)
    (mask,) = tmp_path.rglob("mask.json")
    assert "keep" in mask.read_text()
