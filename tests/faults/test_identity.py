"""What is resumed is known by what it holds: another model, corpus or setting is refused by its key."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from src.mask import Mask
from src.models.fingerprint import weights_fingerprint
from tests.faults.resuming import Run, copy, key


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory, teacher_dir: str, corpus_file: str) -> Run:
    """A search that was stopped after two steps."""
    run = Run("search", tmp_path_factory.mktemp("search"), teacher_dir, corpus_file)
    run.fit()
    return run


def refused(run: Run, capsys: pytest.CaptureFixture[str], *said: str, **changes: str) -> str:
    """A resume ends with status 2, names the keys and leaves the run as it was; what --accept would take."""
    files = [file for file in run.out.rglob("*") if file.suffix in (".ckpt", ".yaml", ".json")]
    before = {file: file.read_bytes() for file in files}
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        run.resume(**changes)
    message = capsys.readouterr().err
    for words in said:
        assert words in message, message
    assert {file: file.read_bytes() for file in files} == before
    return message.split("--accept ")[1].strip().rstrip(".")


def elsewhere(run: Run) -> dict[str, str]:
    """Where a resumed run may leave its own."""
    return {"trainer.logger.init_args.save_dir": str(run.out / "more"), "trainer.callbacks": "null"}


def goes_on(run: Run, told: str = "", **changes: str) -> None:
    """A resume takes its step; it is told of nothing, or of ``told``."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run.resume(**changes, **elsewhere(run))
    said = [str(w.message) for w in found if "ckpt_path: " in str(w.message) or "data: " in str(w.message)]
    said = [text for text in said if "max_steps" not in text]
    assert [text for text in said if told not in text or not told] == []
    assert bool(said) == bool(told)


def test_a_search_of_another_model_of_the_same_shape_is_refused(
    search: Run, child: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(
        search,
        capsys,
        "model.init_args.model was",
        child,
        search.settings[key("model")],
        **{key("model"): child},
    )


@pytest.mark.parametrize("changed", [key("draws"), "data.init_args.batch_size"])
def test_a_change_that_is_accepted_by_its_key_is_told(
    search: Run, changed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    accept = refused(search, capsys, changed, **{changed: "4"})
    assert accept == changed
    for given in (accept, f"data.init_args.seed,{accept.rpartition('.')[0]}"):
        goes_on(search, changed, **{changed: "4", "accept": given})


def test_a_moved_model_and_a_moved_corpus_are_the_same(search: Run, tmp_path: Path) -> None:
    model = copy(search.settings[key("model")], tmp_path / "elsewhere")
    corpus = copy(search.settings["data.init_args.train"], tmp_path / "renamed.jsonl")
    goes_on(
        search, **{key("model"): model, "data.init_args.train": corpus, "data.init_args.validation": corpus}
    )


@pytest.mark.parametrize(
    ("changed", "value"),
    [
        (key("ratio"), "0.5"),
        (key("draws"), "3"),
        (key("policy.init_args.seed"), "7"),
        (key("policy.init_args.form"), "sigmoid"),
        (key("calibration_batches"), "2"),
        (key("distillation.init_args.k"), "5"),
        (key("distillation.init_args.temperature"), "2.0"),
        ("seed_everything", "1"),
        ("data.init_args.seed", "1"),
        ("data.init_args.batch_size", "2"),
        ("data.init_args.supervise", "answer"),
        ("trainer.accumulate_grad_batches", "2"),
    ],
)
def test_another_setting_that_defines_a_search_is_refused(
    search: Run, changed: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(search, capsys, f"{changed} was ", f"is now {value}", **{changed: value})


@pytest.mark.parametrize(
    ("changed", "value"),
    [
        (key("optimizer.init_args.lr"), "0.05"),
        (key("dtype"), "bfloat16"),
        ("trainer.gradient_clip_val", "0.5"),
        ("trainer.precision", "bf16-mixed"),
    ],
)
def test_what_may_change_is_told(search: Run, changed: str, value: str) -> None:
    goes_on(search, changed, **{changed: value})


@pytest.mark.parametrize(
    ("changed", "value"),
    [("trainer.log_every_n_steps", "1"), ("data.init_args.num_workers", "1"), ("trainer.profiler", "simple")],
)
def test_what_does_not_matter_is_not_told(search: Run, changed: str, value: str) -> None:
    goes_on(search, **{changed: value})


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_replaced_corpus_of_the_same_name_is_refused(
    tmp_path: Path, search: Run, split: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal in name, number of rows and bytes."""
    run, rows = search, Path(search.settings["data.init_args.train"]).read_text()
    other = tmp_path / Path(run.settings["data.init_args.train"]).name
    other.write_text(rows.replace("1", "\0").replace("2", "1").replace("\0", "2"))
    assert other.stat().st_size == len(rows.encode())
    refused(
        run,
        capsys,
        f"data.init_args.{split} was [{{'path': '{other.name}'",
        **{f"data.init_args.{split}": str(other)},
    )


def test_a_recovery_with_a_mask_of_another_parent_is_refused(
    recovery: Run, child: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It cuts the same layers: only the weights tell that its teacher would change."""
    mask = Mask(child, 6, (0, 2, 3, 5), "test", fingerprint=weights_fingerprint(child))
    mask.save(tmp_path / "mask.json")
    refused(recovery, capsys, "model.init_args.mask was", child, **{key("mask"): str(tmp_path / "mask.json")})
    refused(recovery, capsys, "model.init_args.model was", child, **{key("model"): child})


def test_a_recovery_whose_teacher_changes_is_refused(
    recovery: Run, child: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = {key("teacher.init_args.model"): child}
    refused(recovery, capsys, "model.init_args.teacher was", **teacher)
    same = copy(str(Mask.load(recovery.settings[key("mask")]).model), tmp_path / "same")
    goes_on(recovery, **{key("teacher.init_args.model"): same})


def test_other_settings_of_a_recovery_are_refused_or_told(
    recovery: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(recovery, capsys, "distillation.init_args.alpha was 1.0 and is now 0.5",
            **{key("distillation.init_args.alpha"): "0.5"})  # fmt: skip
    goes_on(recovery, "warmup", **{key("warmup"): "0.5"})


def test_a_mask_whose_parent_was_replaced_is_refused_unless_it_is_named(
    recovery: Run, child: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same directory holds other weights than the mask was made for."""
    parent = copy(Mask.load(recovery.settings[key("mask")]).model, tmp_path / "parent")
    Mask(parent, 6, (0, 2, 3, 5), "test", fingerprint=weights_fingerprint(parent)).save(
        tmp_path / "mask.json"
    )
    shutil.copyfile(Path(child, "model.safetensors"), Path(parent, "model.safetensors"))
    change = {key("mask"): str(tmp_path / "mask.json"), "trainer.max_steps": "1", **elsewhere(recovery)}
    with pytest.raises(SystemExit, match="2"):
        recovery.fit(**change)
    said = capsys.readouterr().err
    assert "model.init_args.mask: it was made for weights" in said
    assert f"now holds {weights_fingerprint(child)}" in said
    assert f"--model.init_args.model {parent}" in said
    with pytest.warns(UserWarning, match="is recovered with a mask made for"):
        recovery.fit(**change, **{key("model"): parent})


@pytest.mark.parametrize("stage", ["search", "recover"])
def test_a_checkpoint_from_before_is_read_and_told_to_be_unchecked(
    stage: str, search: Run, recovery: Run, tmp_path: Path
) -> None:
    run = search if stage == "search" else recovery
    saved = torch.load(run.checkpoint, weights_only=False)
    del saved["identity"]
    order = saved["Corpus"]["order"]
    del saved["Corpus"]["rendering"], order["validation"]
    order["tokenizer"] = 87
    for part in order["train"]:
        del part["content"]
    torch.save(saved, tmp_path / "old.ckpt")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run.resume(ckpt_path=str(tmp_path / "old.ckpt"), **elsewhere(run))
    said = " ".join(str(w.message) for w in found)
    assert "ckpt_path: the checkpoint notes no model and no settings; they are not checked" in said
    assert "data: the checkpoint does not say what its corpora held" in said


def test_checkpoint_and_mask_note_the_weights_as_plain_values(search: Run, teacher_dir: str) -> None:
    noted = torch.load(search.checkpoint, weights_only=True)["identity"]
    assert noted["weights"] == noted["teacher"] == weights_fingerprint(teacher_dir)
    assert json.loads(json.dumps(noted)) == noted
    assert Mask.load(search.out / "search" / "run" / "mask.json").fingerprint == noted["weights"]


def test_a_mask_without_a_fingerprint_is_read(tmp_path: Path) -> None:
    (tmp_path / "mask.json").write_text('{"model": "m", "num_layers": 2, "keep": [0], "method": "by hand"}')
    assert Mask.load(tmp_path / "mask.json").fingerprint is None
