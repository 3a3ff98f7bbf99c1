"""What an export must never leave behind: a part of a model, or another in place of what was there."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from transformers import PreTrainedModel

from src import cli
from src.errors import ConfigError
from src.export import verb as export
from src.export import write
from src.export.observe import Finding


def left_beside(out: Path) -> list[str]:
    return sorted(p.name for p in out.parent.iterdir() if p.name not in (out.name, "mask.json", "last.ckpt"))


def test_an_existing_directory_stays_unless_forced(run: Callable[..., Path], mask_file: str) -> None:
    out = run()
    before = (out / "config.json").stat().st_ino
    with pytest.raises(ConfigError, match=r"exists.*--force"):
        run()
    assert (out / "config.json").stat().st_ino == before
    run("--force")
    assert (out / "config.json").stat().st_ino != before
    assert not left_beside(out)


def test_force_does_not_replace_what_is_not_a_model(run: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="holds no model"):
        run("--force")
    assert (tmp_path / "out" / "thesis.tex").exists()


@pytest.mark.parametrize("place", ["parent", "parent/short", ".", "link", "link/short"])
def test_force_does_not_touch_the_parent(
    place: str, teacher_dir: str, mask_file: str, tmp_path: Path
) -> None:
    parent = shutil.copytree(teacher_dir, tmp_path / "family" / "parent")
    (tmp_path / "family" / "link").symlink_to(parent)
    shutil.copy(parent / "config.json", parent.parent)  # the directory around it looks like a model too
    out, before = parent.parent / place, {p: p.read_bytes() for p in parent.parent.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match=r"--out: .* is the directory of the parent .* beside it"):
        export.main(["--mask", mask_file, "--model", str(parent), "--out", str(out), "--force"])
    assert {p: p.read_bytes() for p in parent.parent.rglob("*") if p.is_file()} == before


def test_a_failed_check_leaves_no_directory_and_the_old_one_whole(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failing = [Finding("logits = original", False, "differ by 3.0e-01 of 2.0")]
    right = write.prove
    monkeypatch.setattr(write, "prove", lambda *_, **__: failing)
    with pytest.raises(ConfigError, match=r"proof failed.*logits = original: differ by 3.0e-01"):
        run()
    assert not (tmp_path / "out").exists()
    assert not left_beside(tmp_path / "out")
    monkeypatch.setattr(write, "prove", right)
    before = (run() / "config.json").stat().st_ino
    monkeypatch.setattr(write, "prove", lambda *_, **__: failing)
    with pytest.raises(ConfigError, match="proof failed"):
        run("--force")
    assert (tmp_path / "out" / "config.json").stat().st_ino == before


@pytest.mark.parametrize(
    "fault", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left on device")]
)
def test_a_full_disk_leaves_nothing(
    fault: Exception, run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(self: PreTrainedModel, path: Path, **_: Any) -> None:
        (path / "model.safetensors").write_bytes(b"half")
        raise fault

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(ConfigError, match=r"cannot write.*No space left"):
        run()
    assert not (tmp_path / "out").exists()
    assert not left_beside(tmp_path / "out")


def test_a_kill_leaves_no_directory_and_the_next_export_tidies_up(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(write, "prove", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        run()
        os._exit(0)
    running = tmp_path / f".out.{os.getppid()}.partial"
    running.mkdir()
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert left_beside(tmp_path / "out") == sorted([f".out.{child}.partial", running.name])
    assert left_beside(run()) == [running.name]  # another export's, that still runs


@pytest.mark.parametrize("more", [(), ("--force",)])
def test_what_appears_during_an_export_is_not_overwritten(
    more: tuple[str, ...], run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prove = write.prove

    def slow(*args: Any, **kwargs: Any) -> list[Finding]:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("years of work")
        return prove(*args, **kwargs)

    monkeypatch.setattr(write, "prove", slow)
    with pytest.raises(ConfigError, match=r"--out: .* (exists|holds no model)"):
        run(*more)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    assert not left_beside(tmp_path / "out")


def test_a_link_stays_a_link(run: Callable[..., Path], mask_file: str, tmp_path: Path) -> None:
    (link := tmp_path / "link").symlink_to(run())
    export.main(["--mask", mask_file, "--out", str(link), "--force"])
    assert (link.is_symlink(), left_beside(tmp_path / "out")) == (True, ["link"])


@pytest.mark.parametrize("name", ["proof", "gate"])
def test_options_of_the_proof_keep_their_earlier_spelling(name: str) -> None:
    given = ["--mask", "m", "--out", "o"]
    args = export._parse([*given, f"--{name}-tokens", "64", f"--{name}-dtype", "stored"])
    assert (args.proof_tokens, args.proof_dtype) == (64, "stored")
    assert (export._parse(given).proof_tokens, export._parse(given).proof_dtype) == (None, "float32")


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        ({"num_layers": 8}, (), "made for a model of 8 layers.*has 6"),
        ({"keep": [0, 2, 2]}, (), r"rising list of layers, found \[0, 2, 2\]"),
        ({"keep": [0, 9]}, (), r"must lie in 0\.\.5, found \[0, 9\]"),
        ({}, ("--device", "abacus"), "--device: cannot use 'abacus'"),
        ({}, ("--dtype", "int3"), "'int3' given; accepted: .*float32.*bfloat16"),
        ({}, ("--proof-tokens", "3"), "--proof-tokens: '3' given; accepted: a whole number from 8"),
        ({}, ("--checkpoint", "nowhere.ckpt"), "there is no 'nowhere.ckpt'"),
        ({}, ("--lisence", "mit"), "Did you mean '--license'"),
        ({"model": "./nowhere"}, (), r"cannot read a config from '\./nowhere'"),
    ],
)
def test_bad_input_gives_one_message(
    change: dict[str, Any],
    more: tuple[str, ...],
    message: str,
    mask_file: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps(json.loads(Path(mask_file).read_text()) | change))
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", "--mask", str(wrong), "--out", str(tmp_path / "out"), *more])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1
    assert re.search(message, error)
    assert not (tmp_path / "out").exists()
