"""A signal at a random moment of every verb: its status, nothing half written, and the next try succeeds."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.faults.runs import Files, apart, ended, stages_in_forks, status
from tests.faults.test_reports import judged, write_run
from tests.faults.test_stops import STATUS, tools

MOMENTS, STEPS = 3, 12
VERBS = (
    "search",
    "recover",
    "cache",
    "export",
    "patch",
    "evaluate",
    "benchmark",
    "plan",
    "preview",
    "report",
)
STAGES = VERBS[:3]
pytestmark = pytest.mark.slow


class Verb:
    """The command line of a verb, what it leaves when it is over, and how to try again.

    Args:
        name: the verb, or the stage of a fit.
        files: a tiny model, a corpus and a mask.
    """

    def __init__(self, name: str, files: Files) -> None:
        self.name, self.files, self.version = name, files, "run"
        self.place = files.out / "out" if name not in STAGES else files.directory(name, self.version)
        if name == "report":
            write_run(self.place, judged("T", kl=0.0), [judged("S", kl=0.1)])
            self.argv = ["report", "--run", str(self.place)]
        elif name in STAGES:
            self.argv = files.command(name, self.version, steps=STEPS, every=5)
        else:
            self.argv = [name, *tools(files)[name][0]]

    def again(self) -> list[str]:
        """What a user gives next."""
        last = self.files.last(self.name, self.version)
        resumed = [f"--ckpt_path={last}"] if self.name in STAGES and last.exists() else []
        return [*self.argv, *resumed, *(["--force"] if self.name in ("export", "patch") else [])]

    def over(self) -> bool:
        """Whether the results are there, all of them."""
        results = {
            "search": ("mask.json", "record.json"), "recover": ("record.json",),
            "cache": ("part-0/manifest.json",), "export": ("config.json", "model.safetensors"),
            "patch": ("config.json", "model.safetensors"), "report": ("report.json", "report.html"),
            "preview": (),
        }.get(self.name, (".",))  # fmt: skip
        there = all((self.place / name).exists() for name in results)
        if there and self.name == "cache":
            return bool(json.loads((self.place / "part-0/manifest.json").read_text())["complete"])
        return there

    def results(self) -> dict[str, bytes]:
        """What is there to the last bit; a report and figures of speed differ each time."""
        kept = {
            "search": "mask.json",
            "cache": "part-0/*",
            "export": "*.safetensors",
            "patch": "*.safetensors",
        }
        return {f.name: f.read_bytes() for f in self.place.glob(kept.get(self.name, "nothing"))}

    def half_written(self) -> list[Path]:
        return [f for f in self.files.out.rglob(".*.*") if f.suffix in (".partial", ".old")]

    def clear(self) -> None:
        if self.name != "report" and self.place.is_dir():
            shutil.rmtree(self.place)
        elif self.place.is_file():
            self.place.unlink()


@pytest.mark.parametrize("number", STATUS)
@pytest.mark.parametrize("name", VERBS)
def test_a_signal_at_a_random_moment_of_every_verb(name: str, number: signal.Signals, files: Files) -> None:
    """A process that is over is over: what the signal then does to it harms nothing."""
    verb, rng, said = Verb(name, files), random.Random(f"{name}{number}"), files.out / "said"
    assert status(apart(["--help"])) == 0  # what processes are forked from is ready
    began = time.monotonic()
    assert status(apart(verb.argv, said)) == 0
    length, whole = time.monotonic() - began, verb.results()
    stopped = 0
    for _ in range(MOMENTS):
        verb.clear()
        said.unlink()
        process = apart(verb.argv, said)
        while not said.exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.8) * length)
        with suppress(ProcessLookupError):
            os.kill(process.pid or 0, number)
        code, told = status(process), said.read_text()
        assert "Traceback" not in told
        assert code in (STATUS[number], 0, -number), told
        assert verb.half_written() == []
        if code == STATUS[number]:
            stopped += 1
            assert told.rstrip().endswith(f"({number.name})")
            assert told.count(f"({number.name})") == 1
        if code == 0:
            assert verb.over()
        if name == "search" and not (verb.place / "mask.json").exists():
            assert (
                ended(["export", "--mask", str(verb.place / "mask.json"), "--out", str(files.out / "x")]) == 2
            )
        assert status(apart(verb.again(), said)) == 0, said.read_text()
        assert verb.over()
        assert verb.results() == whole
    assert stopped, "a signal came in time"


@pytest.mark.parametrize("number", STATUS)
def test_a_signal_while_a_process_starts_or_ends(number: signal.Signals, files: Files) -> None:
    """Outside of the command the kernel's answer holds, without a traceback; a shell sees the same status."""
    argv = [sys.executable, "-m", "src.cli", "plan", *tools(files)["plan"][0]]
    began = time.monotonic()
    assert subprocess.run(argv, capture_output=True).returncode == 0
    length = time.monotonic() - began
    for share in (0.02, 0.2, 0.5, 0.9, 0.97, 1.0):
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        time.sleep(share * length)
        process.send_signal(number)
        _, told = process.communicate(timeout=120)
        assert process.returncode in (STATUS[number], -number, 0)
        assert b"Traceback" not in told or share < 0.1, (
            "before the first line of the command Python has its own"
        )


@pytest.fixture(scope="module")
def shortened(
    tmp_path_factory: pytest.TempPathFactory, teacher_dir: str, corpus_file: str
) -> tuple[list[str], Path, float]:
    """The one command on tiny files, the run of it that nothing ends, and how long that takes."""
    out = tmp_path_factory.mktemp("shortened")
    held_out = out.with_name("held_out.jsonl")
    held_out.write_text("".join(Path(corpus_file).read_text().splitlines(keepends=True)[:20]))
    few = "--trainer.max_steps=4 --trainer.accelerator=cpu"
    argv = [
        "shorten", "--model", teacher_dir, "--train", corpus_file, "--held-out", str(held_out),
        "--remove", "2",
        "--search", f"{few} --model.init_args.calibration_batches=1",
        "--recover", f"{few} --trainer.val_check_interval=2",
    ]  # fmt: skip
    said = out / "said"
    assert status(apart([*argv, f"--run={out}", "--dry-run"], said)) == 0, said.read_text()
    began = time.monotonic()
    assert status(apart([*argv, f"--run={out}"], said, prepare=stages_in_forks)) == 0, said.read_text()
    return argv, out, time.monotonic() - began


def weights(run: Path) -> dict[str, bytes]:
    """The models of a run of the one command."""
    return {name: (run / name / "model.safetensors").read_bytes() for name in ("cut", "recovered")}


@pytest.mark.parametrize("number", STATUS)
def test_the_one_command_ended_again_and_again_comes_to_the_same_models(
    number: signal.Signals, shortened: tuple[list[str], Path, float], tmp_path: Path
) -> None:
    """A signal at a random moment of whatever stage runs then; each further call goes on."""
    argv, whole, length = shortened
    rng, run, said = random.Random(int(number)), tmp_path / "run", tmp_path / "said"
    run.mkdir()
    shutil.copy(whole / "settings.json", run)
    codes: list[int] = []
    while not codes or codes[-1] != 0:
        said.unlink(missing_ok=True)
        process = apart([*argv, f"--run={run}"], said, prepare=stages_in_forks)
        process.join(rng.uniform(0.1, 0.5) * length)
        if process.exitcode is None:
            with suppress(ProcessLookupError):
                os.kill(process.pid or 0, number)
        codes.append(status(process))
        told = said.read_text()
        assert "Traceback" not in told
        assert codes[-1] in (STATUS[number], 0, -number), told
        assert [*tmp_path.rglob(".*.partial"), *tmp_path.rglob(".*.old")] == []
        assert codes[-1] != STATUS[number] or told.rstrip().endswith(f"({number.name})")
        assert len(codes) < 20, "it goes on"
    assert len(codes) > 1, "a signal came in time"
    assert weights(run) == weights(whole)
