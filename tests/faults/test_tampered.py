"""Files between the stages that were edited, damaged or made by a stranger: one message, nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from src.cache.manifest import Manifest
from src.cli import main
from src.errors import ConfigError
from src.export import card
from src.mask import Mask
from src.models.cut import cut
from src.models.loading import load_model
from src.training.adapters import merged
from tests.faults.directories import altered, refused

FIELDS: dict[str, Any] = {"model": "parent", "num_layers": 6, "keep": [0, 2, 3, 5], "method": "test"}
HALVES = {"attention": [0, 2], "feed_forward": [0, 3]}
MASKS: dict[str, tuple[Any, str]] = {
    "NaN": ({"metrics": {"kl": float("nan")}}, "is not JSON .NaN is no number"),
    "endless": ({"metrics": {"kl": float("inf")}}, "is not JSON .Infinity is no number"),
    "NUL in a name": ({"model": "a\0b"}, "model must be text"),
    "half a character": ({"method": "\ud800"}, "method must be text"),
    "a flag as layer": ({"keep": [True, 2]}, "keep must be a list of whole numbers"),
    "halves as one list": ({"unit": "half"}, "two lists, attention and feed_forward"),
    "layers as two lists": ({"keep": HALVES}, "keep must be one list"),
    "halves out of turn": ({"unit": "half", "keep": {**HALVES, "attention": [3, 4]}}, "must take turns"),
    "unequal halves": ({"unit": "half", "keep": {**HALVES, "attention": [0]}}, "must take turns"),
    "no layers": ({"num_layers": 0}, "must lie in 0"),
    "a kind in a list": ({"unit": ["half"]}, "unit must be one of"),
}


@pytest.mark.parametrize("case", MASKS)
def test_an_edited_mask_is_told_by_its_field(case: str, tmp_path: Path) -> None:
    changes, message = MASKS[case]
    (tmp_path / "mask.json").write_text(json.dumps(FIELDS | changes))
    with pytest.raises(ConfigError, match=message):
        Mask.load(tmp_path / "mask.json")


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe", b"", b"9" * 5000, b"null"])
def test_what_is_no_mask_is_one_message(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mask.json").write_bytes(content)
    argv = ["export", "--mask", str(tmp_path / "mask.json"), "--out", str(tmp_path / "out")]
    assert "mask: '" in refused(argv, capsys)
    assert not (tmp_path / "out").exists()


def test_a_mark_of_utf8_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "mask.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(FIELDS).encode())
    assert Mask.load(tmp_path / "mask.json").keep == (0, 2, 3, 5)


def test_a_device_or_a_pipe_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", tmp_path / "pipe", tmp_path):
        with pytest.raises(ConfigError, match="a directory, a pipe or a device"):
            Mask.load(path)


def test_a_name_that_is_too_long_for_a_file_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Mask("x" * 5000, 6, (0, 2, 3, 5), "test").save(tmp_path / "mask.json")
    argv = ["export", "--mask", str(tmp_path / "mask.json"), "--out", str(tmp_path / "out")]
    assert "File name too long" in refused(argv, capsys)


@pytest.mark.parametrize(
    "scores",
    ["[]", "3", '{"teacher": 1, "models": [1]}', '{"teacher": {}, "models": 5}', "[" * 100_000, "NaN"],
)
def test_scores_that_are_none_leave_the_card_as_it_was(scores: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("as it was")
    (tmp_path / "scores.json").write_text(scores)
    with pytest.raises(ConfigError, match="scores"):
        card.main([str(tmp_path), "--scores", str(tmp_path / "scores.json")])
    assert (tmp_path / "README.md").read_text() == "as it was"


def test_how_outputs_are_returned_is_not_the_model(teacher_dir: str, tmp_path: Path) -> None:
    """A config may ask for tuples, or for every stream: neither comes along."""
    model = altered(teacher_dir, tmp_path / "model", return_dict=False, output_hidden_states=True)
    Mask(str(model), 6, (0, 2, 3, 5), "test").save(tmp_path / "mask.json")
    main(["export", "--mask", str(tmp_path / "mask.json"), "--out", str(tmp_path / "out")])
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told.get("return_dict", True)
    assert not told.get("output_hidden_states")


def test_settings_of_a_tokenizer_are_tried_as_it_is_loaded(
    teacher_dir: str, corpus_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = altered(teacher_dir, tmp_path / "model", "tokenizer_config.json", model_max_length="x")
    argv = ["evaluate", "--model", str(model), "--data", corpus_file]
    assert "tokenizer: cannot read one from" in refused(argv, capsys)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        [1],
        {"peft_type": "NOPE"},
        {"peft_type": "LORA", "r": -1},
        {"peft_type": "LORA", "target_modules": "("},
    ],
)
def test_adapters_with_settings_of_a_stranger_are_one_message(
    settings: Any, teacher_dir: str, mask_file: str, tmp_path: Path
) -> None:
    mask = Mask.load(mask_file)
    about = {"mask": json.dumps(asdict(mask)), "config": json.dumps(settings)}
    save_file({"x": torch.zeros(1)}, tmp_path / "adapters.safetensors", about)
    with pytest.raises(ConfigError, match="the adapters in"):
        merged(cut(load_model(teacher_dir), mask), mask, tmp_path / "adapters.safetensors")


def test_a_manifest_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "part-0").mkdir()
    os.mkfifo(tmp_path / "part-0" / "manifest.json")
    with pytest.raises(ConfigError, match="a directory, a pipe or a device"):
        Manifest.load(str(tmp_path))


def test_a_reader_that_has_had_enough_is_no_traceback() -> None:
    """As in ``... | head -1``."""
    reads, writes = os.pipe()
    os.close(reads)
    argv = [sys.executable, "-m", "src.cli", "--help"]
    process = subprocess.run(argv, stdout=writes, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writes)
    assert (process.returncode, process.stderr) == (141, "")
