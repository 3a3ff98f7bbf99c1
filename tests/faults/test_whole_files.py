"""What exists stays whole until the next one is; what cannot be written is one message and no litter."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from src.errors import ConfigError
from src.files import whole, write_json, write_text
from src.mask import Mask
from tests.faults.runs import Files, apart, ended, forked, state, status
from tests.marks import slow

STEPS_OF_WRITING = [("os.fsync", n) for n in (1, 2, 3, 4)] + [("pathlib.Path.rename", n) for n in (1, 2)]


def waited(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def litter(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.rglob(".*.*") if file.name != ".lock")


# ---------------------------------------------------------------------- whole


def make_file(path: Path, text: str) -> None:
    path.write_text(text)


def make_directory(path: Path, text: str) -> None:
    (path / "part").mkdir(parents=True)
    (path / "part" / "text").write_text(text)


def read(path: Path) -> str:
    return (path / "part" / "text" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("make", [make_file, make_directory])
@pytest.mark.parametrize(("call", "nth"), STEPS_OF_WRITING)
def test_a_kill_at_any_step_of_writing_leaves_the_old_or_the_new_whole(
    make: Callable[[Path, str], None], call: str, nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "target"

    def write(text: str) -> None:
        with whole(path) as partial_path:
            make(partial_path, text)

    def killed() -> None:
        module, _, name = call.rpartition(".")
        owner: Any = os if module == "os" else Path
        original, left = getattr(owner, name), [nth]

        def dying(*args: Any) -> Any:
            left[0] -= 1
            return os._exit(9) if left[0] == 0 else original(*args)

        monkeypatch.setattr(owner, name, dying)
        write("new")

    write("old")
    assert waited(forked(killed)) in (0, 9)
    found = [read(p) for p in tmp_path.iterdir() if p.name == "target" or p.suffix == ".old"]
    assert found, "something whole is there at every moment"
    assert set(found) <= {"old", "new"}
    write("newest")
    assert [p.name for p in tmp_path.iterdir()] == ["target"], "the next write sweeps what was left"
    assert read(path) == "newest"


@pytest.mark.parametrize("make", [make_file, make_directory])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
def test_a_fault_in_the_middle_leaves_what_was_there(
    make: Callable[[Path, str], None], error: type[BaseException], tmp_path: Path
) -> None:
    make(tmp_path / "target", "old")

    def write() -> None:
        with whole(tmp_path / "target") as stage:
            make(stage, "new")
            raise error

    with pytest.raises(error):
        write()
    assert read(tmp_path / "target") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_a_directory_moved_aside_by_a_killed_writer_is_put_back(tmp_path: Path) -> None:
    gone = forked(lambda: None)
    waited(gone)
    make_directory(tmp_path / f".target.{gone}.old", "old")
    with pytest.raises(OSError, match="full"), whole(tmp_path / "target"):
        raise OSError("full")
    assert read(tmp_path / "target") == "old"


# ---------------------------------------------------------------------- cannot be written


def writers(out: str) -> dict[str, Callable[[], None]]:
    """Each way in which a result is written."""
    mask = Mask(model="m", num_layers=2, keep=(0,), method="test")
    return {
        "text": lambda: write_text(out, "x" * 100),
        "json": lambda: write_json(out, {"x": 1.0}),
        "mask": lambda: mask.save(out),
    }


@pytest.mark.parametrize("writer", ["text", "json", "mask"])
@pytest.mark.parametrize(
    ("out", "reason"),
    [
        ("/dev/full", "No space left"),
        ("{tmp}/file/out.json", "(Not a directory|File exists)"),
        ("/proc/self/out.json", "No such file"),
        ("{tmp}/" + "n" * 300, "File name too long"),
    ],
)
def test_what_cannot_be_written_is_one_message(writer: str, out: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    path = out.format(tmp=tmp_path)
    with pytest.raises(ConfigError, match=f"cannot write '{path}': {reason}") as told:
        writers(path)[writer]()
    assert str(told.value).count("\n") == 0
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("existed", [True, False])
def test_a_file_that_does_not_fit_leaves_nothing_half_written(existed: bool, tmp_path: Path) -> None:
    """The kernel itself refuses, in the middle of the file."""
    path = tmp_path / "out.json"
    if existed:
        path.write_text("old")

    def too_large() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write_text(path, "x" * 5000)
        except ConfigError as e:
            raise SystemExit(2 if "File too large" in str(e) else 3) from None

    assert waited(forked(too_large)) == 2
    assert [p.read_text() for p in tmp_path.iterdir()] == (["old"] if existed else [])


def test_verbs_that_write_figures_leave_no_litter_on_a_full_disk(
    files: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = ["--model", files.teacher, "--data", files.corpus, "--limit", "4", "--batch-size", "2"]
    plan = files.command("search", "planned")[1:]
    full = OSError(28, os.strerror(28))
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(full))
    for argv in (["evaluate", *judged, "--out"], ["plan", *plan, "--json"]):
        before = sorted(files.out.iterdir())
        assert ended([*argv, str(files.out / "figures.json")]) == 2
        said = capsys.readouterr().err
        assert said.count("error:") == 1
        assert f"cannot write '{files.out}/figures.json': No space left on device" in said
        assert sorted(files.out.iterdir()) == before


@pytest.mark.parametrize("stage", [slow("search"), "recover"])
def test_a_checkpoint_that_does_not_fit_stops_the_run_and_keeps_the_one_before(
    stage: str, files: Files, tmp_path: Path
) -> None:
    """The disk is full from the second checkpoint on: files may no longer be larger than half of one."""
    argv = files.command(stage, "full", "--trainer.callbacks+=tests.faults.runs.FullDisk")
    said = tmp_path / "said"

    assert status(apart(argv, said)) == 2
    last = files.last(stage, "full")
    errors = [line for line in said.read_text().splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "checkpoint: cannot write" in errors[0]
    assert "File too large" in errors[0]
    assert "Traceback" not in said.read_text()
    assert state(last)["global_step"] == 4
    assert litter(files.out) == []
    assert not (last.parent.parent / "record.json").exists()
    assert ended([*files.command(stage, "full"), f"--ckpt_path={last}"]) == 0


def test_a_run_whose_directory_cannot_be_made_is_one_message(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    (files.out / "file").write_text("")
    for place in (files.out / "file", Path("/proc/self")):
        argv = files.command("search", "x", f"--trainer.logger.init_args.save_dir={place}")
        assert ended(argv) == 2
        said = capsys.readouterr().err
        assert said.count("error:") == 1
        assert str(place) in said


def test_a_directory_that_vanished_is_made_again_and_nothing_is_lost(files: Files) -> None:
    argv = files.command("search", "gone", "--trainer.callbacks+=tests.faults.runs.Vanish")
    assert ended(argv) == 0
    assert state(files.last("search", "gone"))["global_step"] == 8
    assert (files.directory("search", "gone") / "mask.json").exists()


# ---------------------------------------------------------------------- one run


def test_a_second_run_in_a_directory_is_refused_until_the_first_has_died(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage, key in (("search", "trainer.logger.init_args.version"), ("cache", "model.out")):
        where = files.directory(stage, "shared")
        hook = "on_predict_batch_end" if stage == "cache" else "on_train_start"
        mark = files.out / f"paused-{stage}"
        harm = f"{{class_path: tests.faults.runs.Pause, init_args: {{hook: {hook}, mark: {mark}}}}}"
        more = ["--trainer.logger.init_args.version=first"] if stage == "cache" else []
        first = apart([*files.command(stage, "shared", f"--trainer.callbacks+={harm}"), *more])
        while not mark.exists():
            assert first.is_alive()
            time.sleep(0.05)
        before = {p: p.stat().st_mtime_ns for p in where.rglob("*")}
        assert ended(files.command(stage, "shared")) == 2
        said = capsys.readouterr().err
        assert said.count("error:") == 1
        assert key in said
        assert "another run is writing" in said
        assert {p: p.stat().st_mtime_ns for p in where.rglob("*")} == before, (
            "nothing of the first was touched"
        )
        first.kill()
        assert status(first) == -signal.SIGKILL
        assert ended(files.command(stage, "shared")) == 0, "the lock died with its process"
