"""Threads: never more than the process may use, of machines that are files here; what the user says wins."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from src.cli import TOOLS, VERBS, run
from src.command import Parser
from src.training import threads
from tests.faults.runs import Files, ended

V2, V1 = "0::{}\n", "3:memory:/m\n2:cpu,cpuacct:{}\n1:name=systemd:/s\n0::/\n"


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine on which PyTorch would take eight threads, and nothing is said about them."""
    monkeypatch.setenv(threads.VARIABLE, "1")  # what a test sets is undone
    monkeypatch.delenv(threads.VARIABLE)
    count = torch.get_num_threads()
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(count)


def machine(root: Path, monkeypatch: pytest.MonkeyPatch, allowed: int, **files: str) -> Path:
    """Write the files of a machine, on which the process may run on the first processors; return its root."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(allowed)), raising=False)
    for name, text in files.items():
        file = root / name.replace("__", "/").replace("cpu_max", "cpu.max").replace("cpu_cfs", "cpu.cfs")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def limited(root: Path, monkeypatch: pytest.MonkeyPatch, quota: str, allowed: int = 8) -> None:
    """Make this machine one with a quota, for :func:`threads.settle`."""
    files = {"proc__self__cgroup": V2.format("/"), "sys__fs__cgroup__cpu_max": quota}
    monkeypatch.setattr(threads.usable, "__defaults__", (machine(root, monkeypatch, allowed, **files),))


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 8), ("400000 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("900000 100000", 8),
     ("", 8), ("odd", 8), ("-5 100000", 8), ("400000 0", 8)],
)  # fmt: skip
def test_a_quota_of_version_two_limits_and_a_part_of_a_core_is_none(
    quota: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"proc__self__cgroup": V2.format("/a/b"), "sys__fs__cgroup__a__b__cpu_max": quota}
    assert threads.usable(machine(tmp_path, monkeypatch, 8, **files))[0] == cores


def test_the_name_of_a_group_may_hold_spaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"proc__self__cgroup": V2.format("/a b/c"), "sys__fs__cgroup__a b__cpu_max": "300000 100000"}
    assert threads.usable(machine(tmp_path, monkeypatch, 8, **files))[0] == 3


def test_the_least_of_all_groups_above_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "proc__self__cgroup": V2.format("/a/b"), "sys__fs__cgroup__a__b__cpu_max": "600000 100000",
        "sys__fs__cgroup__a__cpu_max": "300000 100000", "sys__fs__cgroup__cpu_max": "max 100000",
    }  # fmt: skip
    assert threads.usable(machine(tmp_path, monkeypatch, 8, **files)) == (
        3,
        "the container may use 3 processors",
    )


@pytest.mark.parametrize("folder", ["cpu,cpuacct", "cpu"])
@pytest.mark.parametrize("place", ["__pod__x", ""])
@pytest.mark.parametrize(("quota", "cores"), [("250000", 2), ("-1", 8)])
def test_a_quota_of_version_one_limits_seen_from_outside_or_within_a_container(
    folder: str, place: str, quota: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within, the group's own directory is the mount, and its path is of the machine outside."""
    group = f"sys__fs__cgroup__{folder}{place}"
    files = {
        "proc__self__cgroup": V1.format("/pod/x"), f"{group}__cpu_cfs_quota_us": quota,
        f"{group}__cpu_cfs_period_us": "100000",
    }  # fmt: skip
    assert threads.usable(machine(tmp_path, monkeypatch, 8, **files))[0] == cores


def test_hyperthreads_of_a_core_count_once_and_those_of_others_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    siblings = {
        f"sys__devices__system__cpu__cpu{n}__topology__thread_siblings_list": f"{n % 4},{n % 4 + 4}\n"
        for n in range(8)
    }
    for allowed, cores in ((8, 4), (5, 4), (3, 3), (1, 1)):
        assert threads.usable(machine(tmp_path, monkeypatch, allowed, **siblings))[0] == cores
    assert threads.usable(machine(tmp_path / "silent", monkeypatch, 5)) == (5, "the process may use 5 cores")


def test_this_machine_gives_what_it_has() -> None:
    cores, reason = threads.usable()
    assert 1 <= cores <= len(os.sched_getaffinity(0))
    assert reason


def test_the_share_is_taken_and_told_once_where_it_departs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limited(tmp_path, monkeypatch, "250000 100000")
    threads.settle()
    threads.settle()
    assert torch.get_num_threads() == 2
    said = "threads: 2, not 8: the container may use 2.5 processors. --threads N sets another number.\n"
    assert capsys.readouterr().err == said
    assert threads.VARIABLE not in os.environ, "each command that this one starts looks for itself"


@pytest.mark.parametrize("quota", ["max 100000", "1600000 100000"])
def test_pytorchs_own_number_is_never_raised(
    quota: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limited(tmp_path, monkeypatch, quota, allowed=16)
    threads.settle()
    assert torch.get_num_threads() == 8
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("asked", "said", "number"), [(None, "3", 8), (5, "3", 5), (12, None, 12), (1, None, 1)]
)
def test_the_environment_wins_over_the_machine_and_the_option_over_both(
    asked: int | None, said: str | None, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """PyTorch itself has read the variable when it was imported: its number, 8 here, stays."""
    limited(tmp_path, monkeypatch, "200000 100000")
    if said:
        monkeypatch.setenv(threads.VARIABLE, said)
    threads.settle(asked)
    assert torch.get_num_threads() == number
    assert os.environ.get(threads.VARIABLE) == (str(asked) if asked else said), "for what this process starts"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("processes", "each"), [(2, 3), (4, 1), (16, 1)])
def test_processes_of_a_run_share_the_machine(
    processes: int, each: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(tmp_path, monkeypatch, "600000 100000")
    threads.settle(processes=processes)
    assert torch.get_num_threads() == each
    assert os.environ[threads.VARIABLE] == str(each)


def test_a_tools_option_sets_them_and_is_no_setting_of_the_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(tmp_path, monkeypatch, "400000 100000")
    assert vars(Parser("x", "").parse_args([])) == {}
    assert torch.get_num_threads() == 4
    assert vars(Parser("x", "").parse_args(["--threads", "7"])) == {}
    assert torch.get_num_threads() == 7


def test_a_fit_takes_them_from_its_option_and_its_ranks_would_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher_dir: str, corpus_file: str, mask_file: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    files = Files(tmp_path, teacher_dir, corpus_file, mask_file)
    limited(tmp_path / "machine", monkeypatch, "300000 100000")
    short = ["--trainer.max_steps=1", "--trainer.callbacks=null", "--model.init_args.draws=1"]
    assert ended(files.command("search", "run", *short)) == 0
    assert torch.get_num_threads() == 3
    assert "threads: 3, not 8: the container" in capsys.readouterr().err
    assert ended(files.command("search", "run", "--threads=2", *short)) == 0
    assert torch.get_num_threads() == int(os.environ[threads.VARIABLE]) == 2
    assert "\nthreads: 2\n" in (tmp_path / "search" / "run" / "config.yaml").read_text()
    assert ended(files.command("search", "run", "--threads=0")) == 2
    assert "threads: 0 given; accepted: a whole number from 1 to 1,024" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [*TOOLS, *VERBS])
def test_every_verb_has_the_option(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run([verb, "--help"])
    assert "--threads" in capsys.readouterr().out
