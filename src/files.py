"""Write files and directories that appear whole or not at all; write and read JSON strictly.

Everything is written under a temporary name beside its target, flushed to the disk, and only then given the
name: a fault, a full disk or a kill leaves what was there before. A temporary name carries the number of its
process, so that the next write can sweep what a killed one left.
"""

from __future__ import annotations

import errno
import glob
import json
import math
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from src.errors import ConfigError


def write_text(path: str | Path, text: str) -> None:
    """Write a file, whole; a device or a pipe is written to as it is.

    Raises:
        ConfigError: it cannot be written; names the path and the reason.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            path.write_text(text)
            return
        with whole(path) as partial:
            partial.write_text(text)
    except OSError as e:
        raise ConfigError(f"{unwritten(path, e)} Make room or choose another directory.") from e


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, as :func:`write_text` does.

    Raises:
        ConfigError: a number in it is NaN or infinite, which JSON cannot say; names it.
    """
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except ValueError as e:
        where = next(_not_finite(value), str(e))
        raise ConfigError(
            f"cannot write '{path}': {where}, and JSON holds finite numbers only. The model, or what it was "
            f"trained with, is broken."
        ) from e
    write_text(path, text + "\n")


def _not_finite(value: Any, key: str = "") -> Iterator[str]:
    """Find the NaN and infinities in a value; each is named as ``key.key is nan``."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{key or 'the value'} is {value}"
    listed = isinstance(value, list | tuple)
    parts = value.items() if isinstance(value, dict) else enumerate(value) if listed else ()
    for name, part in parts:
        yield from _not_finite(part, f"{key}.{name}".lstrip("."))


def read_json(path: str | Path) -> Any:
    """Read a JSON file, whoever wrote it.

    Raises:
        OSError: there is no such file, it cannot be read, or it is a directory, a pipe or a device.
        ValueError: it is no JSON in UTF-8, holds NaN or an infinity, or is nested too deeply.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "it is a directory, a pipe or a device", str(path))
    try:
        return json.loads(Path(path).read_bytes().decode("utf-8-sig"), parse_constant=_refuse)
    except RecursionError as e:
        raise ValueError("it is nested too deeply") from e


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def misfit(path: str | Path) -> str | None:
    """Return why no file can be written at ``path``, as far as can be told beforehand; None if one can."""
    if not Path(path).name or os.path.isdir(path):
        return "it is a directory; give the name of a file"
    above = next(parent for parent in Path(path).absolute().parents if os.path.lexists(parent))
    if not above.is_dir():
        return f"'{above}' is no directory"
    return None if os.access(above, os.W_OK) else f"'{above}' cannot be written to"


def unwritten(path: str | Path, error: OSError) -> str:
    """Return a message that says which path could not be written, why, and that nothing is lost."""
    stays = " What was there stays." if os.path.lexists(path) else ""
    return f"cannot write '{path}': {error.strerror or error}.{stays}"


@contextmanager
def whole(path: str | Path, replace: bool = True) -> Iterator[Path]:
    """Let the block write to a temporary path, and move what it wrote to ``path`` if the block succeeds.

    Args:
        path: the target, a file or a directory.
        replace: whether to replace what is there; otherwise it may at most be an empty directory.

    Yields:
        The temporary path, beside the target.

    Raises:
        OSError: it cannot be written, or something is there. Nothing is left of what was begun.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, glob.escape(path.name))
    partial = beside(path, "partial")
    try:
        yield partial
        settle(partial, path, replace)
    finally:
        discard(partial)


def beside(path: Path, suffix: str) -> Path:
    """Return this process's temporary path beside ``path``.

    Args:
        path: the target.
        suffix: ``partial`` for what is being written, ``old`` for what has been moved aside.
    """
    return path.with_name(f".{path.name}.{os.getpid()}.{suffix}")


def settle(partial: Path, path: Path, replace: bool = True) -> None:
    """Flush what is at ``partial`` to the disk and give it the name ``path``.

    A directory cannot be replaced in one step. The old one is moved aside first, and back if the new one
    cannot take its place; after a kill between the two steps :func:`sweep` moves it back.

    Args:
        partial: a file or a directory.
        path: the target.
        replace: whether to replace what is there; otherwise it may at most be an empty directory.

    Raises:
        OSError: it cannot be written, or something is there that may not be replaced.
    """
    for file in [*partial.rglob("*"), partial]:
        _flush(file)
    old = beside(path, "old")
    try:
        if replace and path.exists() and (path.is_dir() or partial.is_dir()):
            path.rename(old)
        partial.rename(path)  # of a directory: fails where one that is not empty has appeared
        _flush(path.parent)
    finally:
        if old.exists():
            discard(old) if path.exists() else old.rename(path)


def sweep(folder: Path, name: str = "*") -> None:
    """Remove what killed writers left in a folder, and put back what one of them had moved aside.

    Args:
        folder: the folder.
        name: pattern of the targets whose leftovers are removed. The default, all, is for a folder that no
            other machine writes to.
    """
    for left in folder.glob(f".{name}.*.*"):
        target, writer, suffix = left.name[1:].rsplit(".", 2)
        if suffix not in ("partial", "old") or not writer.isdigit() or _runs(int(writer)):
            continue
        if suffix == "old" and not (folder / target).exists():
            left.rename(folder / target)
        else:
            discard(left)


def discard(path: Path) -> None:
    """Remove a file or a directory, if it is there and can be."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some file systems flush no directories
            raise
    finally:
        os.close(handle)


def _runs(process: int) -> bool:
    """Return whether another process of this number runs. A file with our own number is an older one's."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
