"""Growing by the command: plain proven checkpoints, one for each size, or one message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from src.cli import main
from src.errors import ConfigError
from src.grow import verb
from src.grow.growth import Grown
from src.mask import Mask
from tests.faults.runs import ended

KEEP = (0, 2, 5)
HALVES = (0, 1, 2, 7, 10, 11)


def cut_of(teacher: str, out: Path, mask: Mask) -> Path:
    """An export, its weights a little elsewhere as after a recovery."""
    mask.save(out.with_suffix(".json"))
    main(["export", "--mask", str(out.with_suffix(".json")), "--out", str(out)])
    model = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.01)
    model.save_pretrained(out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["layer", "half"])
def test_every_size_is_a_plain_checkpoint(
    unit: str, teacher_dir: str, corpus_file: str, tmp_path: Path
) -> None:
    keep = KEEP if unit == "layer" else HALVES
    mask = Mask(teacher_dir, 6, keep, "test", unit="layer" if unit == "layer" else "half")
    small, out = cut_of(teacher_dir, tmp_path / "small", mask), tmp_path / "grown"
    given = ["--model", str(small), "--data", corpus_file, "--rows", "6", "--batch-size", "3"]
    assert ended(["grow", *given, "--sizes", "4", "6", "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["4-layers", "6-layers", "grow.json"]
    told = json.loads((out / "grow.json").read_text())
    assert [size["layers"] for size in told["sizes"]] == [3, 4, 5, 6]
    assert told["sizes"][-1]["kl"] < told["sizes"][0]["kl"]
    four, theirs = Mask.load(out / "4-layers" / "mask.json"), AutoModelForCausalLM.from_pretrained(small)
    assert {*mask.keep} < {*four.keep}
    assert four.metrics["kl"] == told["sizes"][1]["kl"]
    model = AutoModelForCausalLM.from_pretrained(out / "4-layers")
    assert model.config.num_hidden_layers == 4
    parent = AutoModelForCausalLM.from_pretrained(teacher_dir)
    known = {x.abs().sum().item() for each in (parent, theirs) for x in each.state_dict().values()}
    assert {x.abs().sum().item() for x in model.state_dict().values()} <= known  # nothing was trained
    card = (out / "4-layers" / "README.md").read_text()
    assert "| Grown | from `small` (3 layers) without training, by the KL on 6 rows of" in card
    assert "| logits = original | equal to the last bit |" in card


def test_what_cannot_grow_is_told_in_one_message(
    teacher_dir: str, corpus_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = cut_of(teacher_dir, tmp_path / "small", Mask(teacher_dir, 6, KEEP, "test"))
    other, wide = tmp_path / "other.json", tmp_path / "wide.json"
    Mask(teacher_dir, 6, (0, 1, 5), "test").save(other)
    Mask(teacher_dir, 6, tuple(range(0, 144, 2)), "test", unit="channel", width=24).save(wide)
    for more, message in (
        (["--sizes", "3"], "--sizes: [3] given; accepted: whole numbers above the 3 layers"),
        (["--sizes", "7"], "up to the 6 of its parent"),
        (["--mask", str(other)], "Give the mask that it was recovered with"),
        (["--mask", str(wide)], "a mask of channels removed parts of every layer"),
        (["--model", teacher_dir], "holds no mask.json"),
        (["--out", str(small)], "lies inside it or contains it"),
        (["--data", str(tmp_path / "none.jsonl")], "none.jsonl"),
    ):
        capsys.readouterr()
        out = tmp_path / "out"
        given = {"--model": str(small), "--data": corpus_file, "--out": str(out)}
        given |= dict(zip(more[::2], more[1::2], strict=True))
        assert ended(["grow", *(part for option in given.items() for part in option)]) == 2, more
        error = capsys.readouterr().err
        assert message in error.replace("\n", " "), error
        assert error.count("error:") == 1
        assert not out.exists()


@pytest.mark.slow
def test_what_was_interrupted_goes_on_and_what_was_grown_otherwise_stays(
    teacher_dir: str, corpus_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, out = cut_of(teacher_dir, tmp_path / "small", Mask(teacher_dir, 6, KEEP, "test")), tmp_path / "out"
    given = ["grow", "--model", str(small), "--data", corpus_file, "--rows", "2", "--out", str(out)]
    written, write = list[str](), verb.Pair.write

    def ends(self: verb.Pair, grown: Grown, place: Path, *about: Any) -> None:
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(place.name)
        write(self, grown, place, *about)

    monkeypatch.setattr(verb.Pair, "write", ends)
    with pytest.raises(KeyboardInterrupt):
        ended(given)
    kept = (out / "4-layers" / "README.md").stat().st_mtime_ns
    monkeypatch.setattr(verb.Pair, "write", write)
    assert ended(given) == 0
    assert (out / "4-layers" / "README.md").stat().st_mtime_ns == kept
    assert {path.name for path in out.iterdir()} == {"4-layers", "5-layers", "grow.json"}
    whole = tmp_path / "whole"
    assert ended([*given[:-1], str(whole)]) == 0
    files = sorted(path.relative_to(whole) for path in whole.rglob("*.safetensors"))
    assert [path.parts[0] for path in files] == ["4-layers", "5-layers"]
    for path in files:
        assert (out / path).read_bytes() == (whole / path).read_bytes(), "as if nothing had interrupted"
    with pytest.raises(ConfigError, match="4-layers' was grown otherwise"):
        verb.main([*given[1:], "--rows", "5"])
    assert (out / "4-layers" / "README.md").stat().st_mtime_ns == kept
