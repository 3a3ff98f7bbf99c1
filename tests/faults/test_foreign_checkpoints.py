"""Nothing of strangers runs: a checkpoint is tensors and numbers, or it is not read."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as parts

from src.errors import ConfigError
from src.training import checkpoints
from tests.faults.runs import Files, ended

RAN = "ran"


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.folder / RAN}",)


def zipped(folder: Path) -> Path:
    path = folder / "evil.ckpt"
    torch.save({"state_dict": {}, "recovery": Evil(folder)}, path)
    return path


def plain_pickle(folder: Path) -> Path:
    path = folder / "evil.ckpt"
    path.write_bytes(pickle.dumps(Evil(folder)))
    return path


def legacy(folder: Path) -> Path:
    path = folder / "evil.ckpt"
    torch.save({"state_dict": Evil(folder)}, path, _use_new_zipfile_serialization=False)
    return path


def _parts(folder: Path) -> Path:
    path = folder / "evil.ckpt"
    state = {"state_dict": {"a": torch.ones(3)}, "optimizer_0": {"lr": 0.1}}
    parts.save(state, checkpoint_id=path, no_dist=True)
    torch.save({"recovery": {"tokens": 1}}, path / "meta.pt")
    return path


def description(folder: Path) -> Path:
    """Of the parts, which PyTorch itself unpickles."""
    path = _parts(folder)
    (path / ".metadata").write_bytes(pickle.dumps(Evil(folder)))
    return path


def description_within(folder: Path) -> Path:
    path = _parts(folder)
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.planner_data = Evil(folder)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    return path


def meta(folder: Path) -> Path:
    path = _parts(folder)
    torch.save({"recovery": Evil(folder)}, path / "meta.pt")
    return path


def deepspeed(folder: Path) -> Path:
    path = folder / "evil.ckpt"
    (path / "checkpoint").mkdir(parents=True)
    torch.save({"module": Evil(folder)}, path / "checkpoint" / "mp_rank_00_model_states.pt")
    return path


MADE: list[Callable[[Path], Path]] = [
    zipped, plain_pickle, legacy, description, description_within, meta, deepspeed,
]  # fmt: skip


@pytest.mark.parametrize("make", MADE)
@pytest.mark.parametrize("verb", ["fit", "validate", "export", "record", "weights"])
def test_an_evil_checkpoint_runs_nothing_and_is_one_message(
    make: Callable[[Path], Path], verb: str, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make(files.out)
    (files.out / RAN).unlink(missing_ok=True)
    if verb in ("record", "weights"):
        if (make, verb) in ((meta, "weights"), (deepspeed, "weights")):
            return  # the one has good weights, the other needs DeepSpeed
        with pytest.raises(ConfigError):
            getattr(checkpoints, verb)(str(path))
    else:
        argv = ["export", "--mask", files.mask, "--checkpoint", str(path), "--out", str(files.out / "out")]
        if verb != "export":
            argv = [verb, *files.command("recover", "x")[1:], f"--ckpt_path={path}"]
        assert ended(argv) == 2
        said = capsys.readouterr().err
        assert said.count("error:") == 1
        assert f"'{path}'" in said
        assert "more than tensors and numbers" in said or "damaged or not a checkpoint" in said
        assert "Traceback" not in said
    assert not (files.out / RAN).exists()
    assert not (files.out / "out").exists()


def test_numbers_hidden_in_a_part_are_not_run_either(tmp_path: Path) -> None:
    """PyTorch stores what is no tensor as a pickle in the part's file."""
    path = _parts(tmp_path)
    metadata = pickle.loads((path / ".metadata").read_bytes())
    about = next(info for index, info in metadata.storage_data.items() if index.fqn == "optimizer_0.lr")
    evil = io.BytesIO()
    torch.save(Evil(tmp_path), evil)
    file = path / about.relative_path
    about.offset, about.length = file.stat().st_size, len(evil.getvalue())
    file.write_bytes(file.read_bytes() + evil.getvalue())
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    state = {"optimizer_0": {"lr": 0.0}}
    wanted = r"more than tensors and numbers \((posix|os)\.system\)"
    with pytest.raises(ConfigError, match=wanted), checkpoints.reading(path):
        parts.load(state, checkpoint_id=path, no_dist=True)
    assert not (tmp_path / RAN).exists()


def test_what_the_product_writes_holds_only_what_it_reads(files: Files) -> None:
    """Each stage's checkpoint, moved elsewhere, is read and resumed."""
    for stage in ("search", "recover"):
        assert ended(files.command(stage, "plain")) == 0
        moved = files.out / f"{stage}.ckpt"
        shutil.copyfile(files.last(stage, "plain"), moved)
        assert checkpoints.record(str(moved))["global_step"] == 8
        assert ended(files.command(stage, "again", f"--ckpt_path={moved}", steps=10)) == 0
