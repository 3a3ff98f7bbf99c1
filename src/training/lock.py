"""Let one run at a time write to a directory, and refuse the second."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from src.errors import ConfigError
from src.files import unwritten


@contextmanager
def lock(directory: str | Path, key: str) -> Iterator[None]:
    """Keep other runs from writing to a directory in the block; the lock ends with its process.

    That holds after a kill too: workers that the process forks do not hold the lock.

    Args:
        directory: where the run writes; it is made if it does not exist.
        key: the setting by which the user writes elsewhere.

    Raises:
        ConfigError: another process holds it, or it cannot be written to.
    """
    path = Path(directory) / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as e:
        raise ConfigError(f"{unwritten(directory, e)} Choose another directory ({key}).") from e
    try:
        _take(handle, directory, key)
        yield
    finally:
        os.close(handle)


def _take(handle: int, directory: str | Path, key: str) -> None:
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as e:
        raise ConfigError(
            f"{key}: another run is writing to '{directory}'. Give another one, or wait until it has ended."
        ) from e
    except OSError:
        pass  # a file system without locks: nothing can be told
