"""An export is of the parent that its mask and checkpoint were made for, known by its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from src.cli import main
from src.mask import Mask
from src.models.fingerprint import weights_fingerprint
from tests.faults.resuming import Run, copy, key


def export(out: Path, mask: Path, *more: str) -> str:
    """Export; the card."""
    main(["export", "--mask", str(mask), "--out", str(out), *more])
    return (out / "README.md").read_text()


def not_exported(out: Path, mask: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """The complaint of an export that writes nothing."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main(["export", "--mask", str(mask), "--out", str(out), *more])
    assert not out.exists()
    return capsys.readouterr().err


@pytest.fixture
def mask(teacher_dir: str, tmp_path: Path) -> Path:
    """A mask of the teacher that notes its weights."""
    return made(teacher_dir, tmp_path / "mask.json")


def made(model: str, path: Path) -> Path:
    """A mask that notes the weights of its model."""
    Mask(model, 6, (0, 2, 3, 5), "test", fingerprint=weights_fingerprint(model)).save(path)
    return path


def test_a_mask_of_another_model_is_refused(
    teacher_dir: str,
    child: str,
    mask: Path,
    corpus_file: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = not_exported(tmp_path / "out", mask, capsys, "--model", child)
    for words in ("--mask: it was made for", teacher_dir, child, "--any-parent"):
        assert words in said
    out = ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="2"):
        main(["patch", "--mask", str(mask), "--model", child, "--data", corpus_file, *out])
    assert "--mask: it was made for" in capsys.readouterr().err


def test_a_parent_that_was_replaced_is_refused(
    teacher_dir: str, child: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = copy(teacher_dir, tmp_path / "parent")
    mask = made(parent, tmp_path / "mask.json")
    shutil.copyfile(Path(child, "model.safetensors"), Path(parent, "model.safetensors"))
    assert "another model" in not_exported(tmp_path / "out", mask, capsys)


def test_a_checkpoint_of_another_parent_is_refused_whatever_is_said_of_the_mask(
    recovery: Run, child: str, mask: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--model", child, "--checkpoint", recovery.checkpoint]
    for more in (own, [*own, "--any-parent"]):
        assert "--checkpoint: it was trained under" in not_exported(tmp_path / "out", mask, capsys, *more)
    theirs = made(child, tmp_path / "child.json")
    assert "--checkpoint: it was trained under" in not_exported(tmp_path / "out", theirs, capsys, *own)


@pytest.mark.slow
def test_a_child_that_is_meant_goes_by_its_own_name(
    teacher_dir: str, child: str, mask: Path, tmp_path: Path
) -> None:
    card = export(tmp_path / "out", mask, "--model", child, "--any-parent")
    written = Mask.load(tmp_path / "out" / "mask.json")
    assert f"| Parent | `{Path(child).name}` |" in card
    assert f"| Mask made for | `{Path(teacher_dir).name}` |" in card
    assert (written.model, written.fingerprint) == (child, weights_fingerprint(child))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["depth_pruning"]["parent"] == Path(child).name


@pytest.mark.slow
def test_a_moved_parent_keeps_its_name(teacher_dir: str, mask: Path, tmp_path: Path) -> None:
    card = export(tmp_path / "out", mask, "--model", copy(teacher_dir, tmp_path / "moved"))
    assert Mask.load(tmp_path / "out" / "mask.json").model == teacher_dir
    assert f"| Parent | `{Path(teacher_dir).name}` |" in card


@pytest.mark.slow
def test_a_recovery_of_a_child_vouches_for_the_mask_that_it_used(
    recovery: Run, child: str, mask: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = recovery.settings["data.init_args.train"]
    run = Run("recover", tmp_path, child, corpus, **{key("mask"): str(mask)})
    with pytest.warns(UserWarning, match="is recovered with a mask made for"):
        run.fit()
    theirs = ["--checkpoint", run.checkpoint]
    assert "--checkpoint: it was trained under" in not_exported(tmp_path / "out", mask, capsys, *theirs)
    assert f"| Parent | `{Path(child).name}` |" in export(tmp_path / "out", mask, "--model", child, *theirs)


@pytest.mark.slow
def test_old_masks_and_checkpoints_are_exported_and_told_to_be_unchecked(
    recovery: Run, child: str, mask_file: str, tmp_path: Path
) -> None:
    saved = torch.load(recovery.checkpoint, weights_only=True)
    del saved["identity"]
    torch.save(saved, tmp_path / "old.ckpt")
    with pytest.warns(UserWarning, match="it notes no parent"):
        export(tmp_path / "a", Path(mask_file), "--checkpoint", str(tmp_path / "old.ckpt"))
    with pytest.warns(UserWarning, match="cannot be told"):
        card = export(tmp_path / "b", Path(mask_file), "--model", child)
    assert Mask.load(tmp_path / "b" / "mask.json").model == child
    assert f"| Parent | `{Path(child).name}` |" in card
