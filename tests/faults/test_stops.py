"""A run that is told to end says so with its status, and what comes after it refuses or resumes."""

from __future__ import annotations

import json
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import src.cli
from src.cli import main
from src.training import stopping
from tests.faults.runs import Files, assert_same, ended, forked, state

SIGNAL_AT = (
    "--trainer.callbacks+={class_path: tests.faults.runs.SignalAt, init_args: {step: %d, number: %d%s}}"
)
STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}
KEPT = ("state_dict", "optimizer_states", "lr_schedulers", "budget", "recovery")


def told(step: int, number: int = signal.SIGTERM, hook: str | None = None) -> str:
    """An argument that makes a run send itself a signal."""
    return SIGNAL_AT % (step, number, f", hook: {hook}" if hook else "")


def results(directory: Path) -> list[str]:
    """Names of what a finished run leaves, and of what is half written."""
    names = {file.name for file in directory.rglob("*")}
    return sorted(name for name in names if name in ("mask.json", "record.json") or "partial" in name)


@pytest.mark.parametrize(("stage", "number"), [("search", signal.SIGTERM), ("recover", signal.SIGINT)])
def test_a_fit_stops_after_its_step_and_resumes_to_the_same_end(
    stage: str, number: signal.Signals, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(files.command(stage, "whole")) == 0
    argv = files.command(stage, "told")
    capsys.readouterr()
    assert ended([*argv, told(5, number)]) == STATUS[number]
    last = files.last(stage, "told")
    assert (
        f"stopped at step 6 of 8; resume with the same command and --ckpt_path {last}"
        in capsys.readouterr().err
    )
    assert state(last)["global_step"] == 6, "the step at hand is done and saved, off the beat of checkpoints"
    assert results(files.directory(stage, "told")) == []
    assert ended([*argv, f"--ckpt_path={last}"]) == 0
    whole, resumed = state(files.last(stage, "whole")), state(last)
    for key in KEPT:
        assert_same(whole.get(key), resumed.get(key), key)
    if stage == "search":
        masks = [(files.directory(stage, name) / "mask.json").read_bytes() for name in ("whole", "told")]
        assert masks[0] == masks[1]


def test_half_a_step_is_not_saved(files: Files) -> None:
    """A signal between the micro-batches of a step waits for the step."""
    argv = files.command("recover", "told", "--trainer.accumulate_grad_batches=2")
    assert ended([*argv, told(2, hook="on_before_zero_grad")]) == 143
    saved = state(files.last("recover", "told"))
    assert (
        saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]
        == 2 * saved["global_step"]
    )


@pytest.mark.parametrize(
    ("hook", "said"),
    [
        ("on_train_start", "stopped at step 0 of 8; nothing was saved; begin again with the same command"),
        ("on_train_end", "stopped at step 8 of 8; resume with the same command and --ckpt_path"),
    ],
)
def test_a_fit_that_is_told_before_or_after_its_steps_stops_at_once(
    hook: str, said: str, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = files.command("search", "told")
    assert ended([*argv, told(0, hook=hook)]) == 143
    assert said in capsys.readouterr().err
    directory = files.directory("search", "told")
    assert "record.json" not in results(directory)
    last = files.last("search", "told")
    assert ended([*argv, *([f"--ckpt_path={last}"] if last.exists() else [])]) == 0
    assert results(directory) == ["mask.json", "record.json"], (
        "a run killed after its last step gets its result"
    )


def test_a_cache_stops_after_its_batch_and_resumes(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(files.command("cache", "whole")) == 0
    argv = files.command("cache", "told")
    hook = "{class_path: tests.faults.runs.SignalAt, init_args: {step: 0, hook: on_predict_batch_end}}"
    capsys.readouterr()
    assert ended([*argv, f"--trainer.callbacks+={hook}"]) == 143
    assert "the cache is incomplete; resume with the same command" in capsys.readouterr().err
    part = files.directory("cache", "told") / "part-0"
    assert (
        not json.loads((part / "manifest.json").read_text())["complete"]
        if (part / "manifest.json").exists()
        else 1
    )
    assert ended(argv) == 0
    whole = files.directory("cache", "whole") / "part-0"
    assert {f.name: f.read_bytes() for f in part.iterdir()} == {
        f.name: f.read_bytes() for f in whole.iterdir()
    }


def tools(files: Files) -> dict[str, tuple[list[str], str]]:
    """Every other verb, and a function in whose midst it is told to end."""
    out = str(files.out / "out")
    judged = ["--model", files.teacher, "--data", files.corpus]
    search = files.command("search", "planned")[1:]
    return {
        "export": (["--mask", files.mask, "--out", out], "src.export.write.prove"),
        "patch": (
            ["--mask", files.mask, "--data", files.corpus, "--rows", "4", "--out", out],
            "src.export.write.prove",
        ),
        "evaluate": ([*judged, "--teacher", files.teacher, "--out", out], "src.evaluate.verb.row_sums"),
        "benchmark": (
            ["--baseline", files.teacher, "--model", files.teacher, "--out", out],
            "src.benchmark.compare",
        ),
        "plan": ([*search, "--json", out], "src.plan.verb.advise"),
        "preview": (
            [
                "--config",
                "configs/search/gumbel_topk.yaml",
                f"--data.init_args.train={files.corpus}",
                f"--model.init_args.model={files.teacher}",
            ],
            "src.data.preview.documents",
        ),
    }


@pytest.mark.parametrize("number", STATUS)
@pytest.mark.parametrize("verb", ["export", "patch", "evaluate", "benchmark", "plan", "preview"])
def test_every_other_verb_ends_at_once_and_leaves_nothing(
    verb: str, number: signal.Signals, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv, function = tools(files)[verb]
    before = sorted(files.out.iterdir())
    monkeypatch.setattr(function, lambda *_, **__: os.kill(os.getpid(), number))
    assert ended([verb, *argv]) == STATUS[number]
    assert sorted(files.out.iterdir()) == before


def test_a_report_that_is_told_to_end_keeps_the_files_it_had(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.report.run.Run.read", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    (files.out / "report.json").write_text("{}")
    assert ended(["report", "--run", str(files.out)]) == 143
    assert (files.out / "report.json").read_text() == "{}"


def test_an_error_that_a_signal_caused_counts_as_the_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries may turn the end that was asked for into an error of their own."""

    def swallowing(_: list[str]) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException as e:
            raise RuntimeError("a worker was lost") from e

    monkeypatch.setattr(src.cli, "run", swallowing)
    assert ended([]) == 143


def test_a_second_signal_kills_and_its_echo_does_not() -> None:
    """A terminal and a launcher may both deliver the first; the second comes later."""

    def deaf(pause: float, times: int) -> None:
        with stopping.heeded():
            stopping.patient(True)
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(pause)

    for pause, status in ((stopping.AGAIN + 0.2, -signal.SIGTERM), (0.0, 0)):
        child = forked(partial(deaf, pause, 2))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status


def test_signals_mean_what_they_did_once_a_command_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that was ignored stays ignored, as in the background of a shell."""
    before: dict[int, Any] = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    monkeypatch.setattr(src.cli, "run", lambda _: None)
    main([])
    assert {number: signal.getsignal(number) for number in before} == before
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        monkeypatch.setattr(src.cli, "run", lambda _: os.kill(os.getpid(), signal.SIGINT))
        main([])
    finally:
        signal.signal(signal.SIGINT, before[signal.SIGINT])


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job of SLURM with one task; what ``scontrol`` is asked for is written to the file."""
    asked = tmp_path / "asked"
    job = {
        "JOB_ID": 7,
        "JOB_NAME": "train",
        "NTASKS": 1,
        "PROCID": 0,
        "LOCALID": 0,
        "NODEID": 0,
        "NODELIST": "here",
    }
    for key, value in job.items():
        monkeypatch.setenv(f"SLURM_{key}", str(value))
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    return asked


def test_the_requeue_signal_of_slurm_means_what_it_did(files: Files, slurm: Path) -> None:
    """Lightning's own answer saves ``hpc_ckpt`` and asks for the requeue; the next job goes on from there."""
    assert ended(files.command("recover", "whole")) == 0
    argv = [*files.command("recover", "told"), f"--trainer.default_root_dir={files.out / 'root'}"]
    assert ended([*argv, told(5, signal.SIGUSR1, "on_train_batch_end"), told(6)]) == 143, (
        "SLURM then ends the job"
    )
    assert slurm.read_text() == "requeue 7\n"
    assert state(files.out / "root" / "hpc_ckpt_1.ckpt")["global_step"] == 5
    assert ended([*argv, "--ckpt_path=hpc"]) == 0
    whole, resumed = (state(files.last("recover", name)) for name in ("whole", "told"))
    for key in KEPT:
        assert_same(whole.get(key), resumed.get(key), key)
