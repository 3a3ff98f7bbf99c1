"""Limits of the control groups that a process is in, of machines that are files here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from src.plan import devices
from src.training import control_groups

V1_UNLIMITED = "9223372036854771712"


def machine(root: Path, groups: str, **limits: str) -> Path:
    """Write the process's groups and the limits of memory of some; return the root."""
    for name, text in {"proc/self/cgroup": groups, **limits}.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


@pytest.mark.parametrize(
    ("limit", "found"), [("17179869184", [17179869184]), ("max", []), ("", []), ("-1", [])]
)
def test_memory_of_both_versions(limit: str, found: list[int], tmp_path: Path) -> None:
    two = machine(tmp_path / "2", "0::/a b/c\n", **{"sys/fs/cgroup/a b/memory.max": limit})
    one = machine(
        tmp_path / "1", "9:name=systemd:/\n4:memory:/pod\n1:cpu:/\n0::/\n",
        **{"sys/fs/cgroup/memory/memory.limit_in_bytes": limit},
    )  # fmt: skip
    assert [*control_groups.memory(two)] == [*control_groups.memory(one)] == found
    assert not [*control_groups.processors(two), *control_groups.processors(one)]


def test_all_groups_above_limit(tmp_path: Path) -> None:
    limits = {"sys/fs/cgroup/a/b/memory.max": "300", "sys/fs/cgroup/a/memory.max": "200"}
    assert [*control_groups.memory(machine(tmp_path, "0::/a/b\n", **limits))] == [300, 200]
    assert not [*control_groups.memory(tmp_path / "none")]


def test_a_plan_takes_the_least_of_machine_and_container(monkeypatch: pytest.MonkeyPatch) -> None:
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limits, memory in (([], physical), ([int(V1_UNLIMITED)], physical), ([2**30, 2**31], 2**30)):
        monkeypatch.setattr(control_groups, "memory", lambda limits=limits: limits)
        assert devices.device("cpu").memory == memory
