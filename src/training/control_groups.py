"""Read what a container gives to its processes: the limits of the control groups that this process is in.

Both versions of the kernel's control groups are read. A container may see only the last of its groups, as the
mount itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path("/")
"""Directory of the file systems ``proc`` and ``sys``."""


def processors(root: Path = ROOT) -> Iterator[float]:
    """Yield the limits of computing time, in processors."""
    for version, group in _groups(root, "cpu"):
        if version == 2:
            yield from _share(words(group / "cpu.max"))
        else:
            yield from _share([*words(group / "cpu.cfs_quota_us"), *words(group / "cpu.cfs_period_us")])


def memory(root: Path = ROOT) -> Iterator[int]:
    """Yield the limits of memory, in bytes."""
    for version, group in _groups(root, "memory"):
        found = words(group / ("memory.max" if version == 2 else "memory.limit_in_bytes"))
        yield from (int(word) for word in found[:1] if word.isdecimal())


def words(file: Path) -> list[str]:
    """Return the words of a file of the kernel; none of one that cannot be read."""
    return _text(file).split()


def _groups(root: Path, controller: str) -> Iterator[tuple[int, Path]]:
    """Yield the version and the directory of each group of a controller, and of those above it."""
    mount = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from ((2, group) for group in _up(mount, path))
        elif controller in controllers.split(","):
            for own in dict.fromkeys((controllers, controller)):
                yield from ((1, group) for group in _up(mount / own, path))


def _up(mount: Path, path: str) -> Iterator[Path]:
    """Yield the directory of a group, and those of the groups above it."""
    group = mount / path.lstrip("/")
    yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(mount))


def _share(found: Sequence[str]) -> Iterator[float]:
    """Yield quota over period, unless there is no quota (``max`` or -1)."""
    if len(found) == 2 and found[0].isdecimal() and int(found[1]) > 0:
        yield int(found[0]) / int(found[1])


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
