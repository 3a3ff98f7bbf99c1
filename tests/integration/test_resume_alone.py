"""A run resumes from its checkpoint alone as by its whole command; what is given beside wins, and is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning import Trainer

from src.callbacks import LastCheckpoint
from src.training.resuming import with_settings
from tests.faults.runs import Files, ended
from tests.integration.test_resume import same
from tests.marks import slow


@pytest.fixture
def files(tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str) -> Files:
    return Files(tmp_path, teacher_dir, corpus_file, mask_file)


class Killed(Exception):
    """Ends a run as an error of its machine would."""


def broken(files: Files, stage: str) -> Path:
    """Leave a run of eight steps that ended after its fifth, and return its directory.

    Its last checkpoint is of the fourth. No version is given, so each launch has a directory of its own.
    """
    saving = LastCheckpoint.on_train_batch_end

    def dying(self: LastCheckpoint, trainer: Trainer, *about: Any) -> None:
        saving(self, trainer, *about)
        if trainer.global_step == 5:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LastCheckpoint, "on_train_batch_end", dying)
        with pytest.raises(Killed):
            ended(files.command(stage, "null"))
    run = files.directory(stage, "version_0")
    assert state(run)["global_step"] == 4
    return run


def last(run: Path) -> str:
    return str(run / "checkpoints" / "last.ckpt")


def state(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(last(run), weights_only=False)
    return content


@pytest.mark.parametrize("stage", ["search", slow("recover")])
def test_it_equals_a_resume_by_the_whole_command_and_goes_on_in_its_directory(
    stage: str, files: Files
) -> None:
    run = broken(files, stage)
    other = files.directory(stage, "version_1")
    assert ended(files.command(stage, "null", f"--ckpt_path={last(run)}")) == 0
    begun = {"recovers.json"} if stage == "recover" else set()
    assert {file.name for file in run.glob("*.json")} == begun
    assert ended(["fit", "--ckpt_path", last(run)]) == 0
    assert {*run.parent.iterdir()} == {run, other}
    assert state(run)["global_step"] == 8
    same(state(run), state(other))
    settings, alone = (folder / "config.yaml" for folder in (other, run))
    lines = zip(settings.read_text().splitlines(), alone.read_text().splitlines(), strict=True)
    assert [(a.strip(), b.strip()) for a, b in lines if a != b] == [("version: null", "version: version_0")]
    results = {"mask.json", "gates.json"} if stage == "search" else begun
    assert {file.name for file in run.glob("*.json")} == {*results, "record.json"}
    for name in results:
        assert (run / name).read_bytes() == (other / name).read_bytes()


def test_what_is_given_wins_and_is_told_and_what_defines_the_run_is_refused(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = broken(files, "search")
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("trainer: {max_steps: 6, gradient_clip_val: 0.5}\n")
    alone, changed = ["fit", "--ckpt_path", last(run)], "model.init_args.draws"
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}

    assert ended([*alone, f"--{changed}", "3"]) == 2
    told = capsys.readouterr().err
    assert f"resume: settings of {run}/config.yaml, but --{changed} 3" in told.splitlines()
    assert f"{changed} was 2 and is now 3" in told
    left = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    assert {name: left[name] for name in before} == before

    accepted = [f"--{changed}", "3", "--accept", changed]
    assert ended([*alone, *accepted, "--config", str(overlay), "--trainer.max_steps=5"]) == 0
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert settings["model"]["init_args"]["draws"] == 3
    trainer = settings["trainer"]
    assert (trainer["max_steps"], trainer["gradient_clip_val"]) == (5, 0.5)
    assert state(run)["global_step"] == 5
    assert ended([*alone, "--trainer.max_steps=6", f"--{changed}=2"]) == 2, (
        "what was accepted once is not again"
    )


def test_a_validation_leaves_the_settings_of_the_run(files: Files) -> None:
    run = broken(files, "recover")
    before = (run / "config.yaml").read_bytes()
    assert ended(["validate", "--ckpt_path", last(run), "--trainer.logger.init_args.version=version_0"]) == 0
    assert (run / "config.yaml").read_bytes() == before


@pytest.mark.parametrize(
    "content", [None, "model: [", "model: {class_path: src.search.MaskSearch, init_args: {odd: 1}}\ndata: {}"]
)
def test_settings_that_cannot_be_used_are_one_message(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "last.ckpt").write_bytes(b"none")
    if content:
        (tmp_path / "config.yaml").write_text(content)
    assert ended(["fit", f"--ckpt_path={folder}/last.ckpt"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 + ("odd" in str(content)), "what can be read is told to be resumed"
    said = [line for line in said if not line.startswith("resume: settings of ")]
    assert [line.partition(":")[0] for line in said] == ["error"]
    assert ("odd" if content and "odd" in content else "config.yaml") in said[0]
    assert len(said[0]) < 300
    assert len(list(tmp_path.rglob("*"))) == 2 + bool(content)


@pytest.mark.parametrize(
    "given",
    [
        ["--config", "configs/demo/search.yaml", "--ckpt_path", "{}"],
        ["-c", "configs/demo/search.yaml", "--ckpt_path={}"],
        ["--config=configs/demo/search.yaml", "--ckpt_path={}"],
        ["--model=MaskSearch", "--ckpt_path", "{}"],
        ["--ckpt_path", "{}", "--ckpt_path", "last"],
        ["--ckpt_path", "s3://bucket/last.ckpt"],
        ["--trainer.max_steps", "3"],
        [],
    ],
)
def test_a_command_that_names_its_experiment_or_no_path_stays_as_it_is(
    given: list[str], tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text("seed_everything: 1\nmodel: {class_path: src.search.MaskSearch}\n")
    argv = ["fit", *(word.format(tmp_path / "last.ckpt") for word in given)]
    assert with_settings(argv) == argv


@pytest.mark.parametrize("folder", ["", "checkpoints/"])
@pytest.mark.parametrize(
    "spelled", [["--ckpt_path={}"], ["--ckpt_path", "{}"], ["--ckpt_path", "last", "--ckpt_path={}"]]
)
def test_settings_come_first_without_what_held_for_one_launch(
    folder: str, spelled: list[str], tmp_path: Path
) -> None:
    noted = {
        "seed_everything": 1, "data": {"class_path": "src.data.Corpus"}, "accept": "model",
        "ckpt_path": "old", "model": {"class_path": "src.search.MaskSearch"}, "trainer": {"logger": True},
        "verbose": True,
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(noted))
    given = [word.format(f"{tmp_path}/{folder}last.ckpt") for word in spelled]
    verb, option, settings, *rest = with_settings(["validate", *given, "--trainer.devices", "2"])
    assert (verb, option, rest) == ("validate", "--config", [*given, "--trainer.devices", "2"])
    kept = ("seed_everything", "data", "model", "trainer")
    assert yaml.safe_load(settings) == {key: noted[key] for key in kept}


def test_help_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(["fit", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "Without --config the settings in the config.yaml of its run are used" in told
