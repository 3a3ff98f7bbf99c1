"""A checkpoint that cannot be read is one message, which names a whole one beside it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from src.errors import ConfigError
from src.mask import Mask
from src.training import checkpoints
from tests.faults.runs import Files, ended

DAMAGES: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "torn": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "text": lambda path: path.write_text("not a checkpoint"),
    "json": lambda path: path.write_text("{}"),
    "a number": lambda path: torch.save(3, path),
    "another pickle": lambda path: path.write_bytes(pickle.dumps({"state_dict": {}})),
}


@pytest.fixture(scope="module")
def kept(
    tmp_path_factory: pytest.TempPathFactory, teacher_dir: str, corpus_file: str
) -> tuple[Files, bytes, bytes]:
    """A recovery, its last checkpoint and the whole one beside it."""
    out = tmp_path_factory.mktemp("kept")
    Mask(model=teacher_dir, num_layers=6, keep=(0, 2, 3, 5), method="test").save(out / "mask.json")
    files = Files(out, teacher_dir, corpus_file, str(out / "mask.json"))
    assert ended(files.command("recover", "kept")) == 0
    last = files.last("recover", "kept")
    return files, last.read_bytes(), (last.parent / "kept.ckpt").read_bytes()


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("verb", ["fit", "validate", "export"])
def test_a_checkpoint_that_is_not_whole_is_one_message_that_names_one_that_is(
    verb: str, damage: str, kept: tuple[Files, bytes, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    files, last, other = kept
    path = files.last("recover", "kept")
    path.write_bytes(last)
    (path.parent / "kept.ckpt").write_bytes(other)
    DAMAGES[damage](path)
    out = files.out / "exported"
    argv = ["export", "--mask", files.mask, "--checkpoint", str(path), "--out", str(out)]
    if verb != "export":
        argv = [verb, *files.command("recover", "kept")[1:], f"--ckpt_path={path}"]
    assert ended(argv) == 2
    said = capsys.readouterr().err
    assert said.count("error:") == 1
    assert ("there is no" if damage == "missing" else "damaged or not a checkpoint") in said
    assert f"The newest whole one beside it is '{path.parent / 'kept.ckpt'}'" in said
    assert "Traceback" not in said
    assert not out.exists()


@pytest.mark.parametrize("word", ["best", "hpc"])
def test_a_word_that_names_no_checkpoint_is_refused(
    word: str, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(files.command("search", "x", f"--ckpt_path={word}")) == 2
    assert f"ckpt_path: '{word}'" in capsys.readouterr().err


def test_checkpoints_of_whole_and_torn_directories_are_told_apart(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as parts

    for name in ("old.ckpt", "torn.ckpt"):
        parts.save({"state_dict": {"a": torch.ones(300)}}, checkpoint_id=tmp_path / name, no_dist=True)
        torch.save({"recovery": {"tokens": 1}}, tmp_path / name / "meta.pt")
    part = next((tmp_path / "torn.ckpt").glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:50])
    assert torch.equal(checkpoints.weights(str(tmp_path / "old.ckpt"))["a"], torch.ones(300))
    for read_it in (checkpoints.record, checkpoints.weights):
        with pytest.raises(ConfigError, match=r"torn.ckpt' is damaged.*whole one beside it is '.*old.ckpt'"):
            read_it(str(tmp_path / "torn.ckpt"))
    (tmp_path / "torn.ckpt" / ".metadata").unlink()
    with pytest.raises(ConfigError, match="damaged"):
        checkpoints.record(str(tmp_path / "torn.ckpt"))
    assert json.dumps(checkpoints.record(str(tmp_path / "old.ckpt"))) == '{"recovery": {"tokens": 1}}'
