"""Compute fingerprints of corpora, so that a corpus is recognised by its content, not by its path or name."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fsspec
from datasets import load_dataset_builder

from src.data.formats import UNREADABLE, reason
from src.data.sources import Source, find_files, open_saved
from src.errors import ConfigError

_BLOCKS, _BLOCK = 16, 1 << 14


def described(sources: list[Source]) -> list[dict[str, Any]]:
    """Return each source of a mixture as a dict of its settings, with the fingerprint of its content.

    Raises:
        ConfigError: there is no such file or dataset.
    """
    return [
        {**asdict(source), "path": Path(source.path).name, "content": fingerprint(source)}
        for source in sources
    ]


def alike(was: list[dict[str, Any]], now: list[dict[str, Any]]) -> bool:
    """Return whether two mixtures, from :func:`described`, are the same.

    All settings of a source must be equal, and its content: not its path, which may have moved. If a content
    is not known, the name of the file or dataset must be equal instead. The order of sources counts.
    """
    if len(was) != len(now):
        return False
    for pair in zip(was, now, strict=True):
        a, b = ({"rows": None, **part} for part in pair)  # older notes have no such key
        open_ = "path" if a.get("content") and b.get("content") else "content"
        if {**a, open_: None} != {**b, open_: None}:
            return False
    return True


def fingerprint(source: Source) -> str | None:
    """Return a fingerprint of what a source holds; None where it cannot be known.

    Of a local file the size and 16 blocks of 16 KiB are read, evenly spaced: all of it up to 256 KiB. A
    change of a larger file between the blocks is not seen if it keeps the size. Of a remote file the size and
    the first block are read. A dataset of the Hub is known by its commit. The names of files do not count;
    their order does.

    Raises:
        ConfigError: there is no such file or dataset, or it cannot be read.
    """
    files = find_files(source)
    try:
        if files is None and not Path(source.path).is_dir():
            commit: str | None = load_dataset_builder(source.path, source.name).hash
            return commit
        if files is None:
            files = [part["filename"] for part in open_saved(source.path, source.split).cache_files]
        digest = hashlib.sha256()
        for file in files:
            _sample(file, digest)
    except ConfigError:
        raise
    except (*UNREADABLE, KeyError, RuntimeError) as e:
        raise ConfigError(f"data: '{source.path}' cannot be read: {reason(e)}") from e
    return digest.hexdigest()[:24]


def _sample(file: str, digest: Any) -> None:
    system, path = fsspec.core.url_to_fs(file)
    size = system.size(path)
    digest.update(f"{size} ".encode())
    if not size:
        return
    last = 0 if "://" in file else max(0, size - _BLOCK)
    with system.open(path, "rb") as stream:
        for start in sorted({last * i // (_BLOCKS - 1) for i in range(_BLOCKS)}):
            stream.seek(start)
            digest.update(stream.read(_BLOCK))
