"""Open the sources of documents (files, the Hub, saved datasets) as one kind of stream.

Every source becomes a ``datasets.IterableDataset`` of rows, whose position can be saved and
restored. Files are read row by row, local or remote, compressed or not, and never stored whole.
Each row says under the key ``WHERE`` (:mod:`src.data.formats`) where it comes from, so that an error message
can name the file and the row.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    load_dataset,
    load_from_disk,
)  # fmt: skip
from datasets.distributed import split_dataset_by_node

from src.data.formats import SUFFIXED, UNREADABLE, WHERE, Format, Row, read_files, reason, suffix
from src.errors import ConfigError

_SPLIT = re.compile("(?<![a-z])(train|test|val|dev|eval)(?:ing|id|idation|uation)?(?![a-z])")


@dataclass(frozen=True)
class Source:
    """Names a corpus, or one of several that are mixed.

    Args:
        path: a Hub id; a file, glob, directory or URL of JSONL, Parquet or text, compressed or not;
            or a directory written by ``Dataset.save_to_disk``.
        weight: share of the documents drawn from this source, relative to the other weights. Give one to
            every source or to none: without weights an epoch holds every document once; with weights a
            source that runs out starts again, and the epoch ends when each was read to its end.
        split: split of a Hub or saved dataset; None is the only one that it has.
        name: configuration of a Hub dataset.
        rows: number of first rows that are read, in every epoch; None reads all.
        format: format of the files where the suffix does not tell; ``lines`` (the meaning of
            ``.txt``) makes a document of each line, ``text`` of each file.
    """

    path: str
    weight: float | None = None
    split: str | None = None
    name: str | None = None
    rows: int | None = None
    format: Format | None = None


def open_source(source: Source, share: int, shares: int) -> IterableDataset:
    """Open one share of a source, as a stream of rows whose position can be saved.

    Readers that run side by side take a share each. Whole files are dealt out to the shares if their number
    allows it, else single rows.

    Args:
        source: what to open.
        share: number of the share, from 0.
        shares: into how many disjoint shares the rows are dealt.

    Raises:
        ConfigError: there is no such file or dataset.
    """
    files = find_files(source)
    if files is None and Path(source.path).is_dir():
        open_saved(source.path, source.split)  # complains now rather than at the first row
        saved = {"path": source.path, "split": source.split, "rows": source.rows}
        own = {"share": share, "shares": shares}
        return IterableDataset.from_generator(read_saved, gen_kwargs={**saved, **own})
    if files is None:
        data = _hub(source) if source.rows is None else _hub(source).take(source.rows)
        return split_dataset_by_node(data, rank=share, world_size=shares)
    if len(files) % shares == 0 and source.rows is None:
        files, share, shares = files[share::shares], 0, 1
    # Of a list each entry is read on its own; what counts rows over all files wants them together.
    together = list if source.rows is None else tuple
    keys: dict[str, Any] = {"files": together(enumerate(files)), "share": share, "shares": shares}
    keys |= {"format": source.format, "most": source.rows}
    return IterableDataset.from_generator(read_files, gen_kwargs=keys)


def read_saved(
    path: str, split: str | None, share: int, shares: int, rows: int | None = None
) -> Iterator[Row]:
    """Yield the rows of one share of a saved dataset: every ``shares``-th row.

    A row says under the key ``WHERE`` where it comes from.

    Args:
        path: a directory written by ``Dataset.save_to_disk``.
        split: its split; None is the only one that it has.
        share: number of the share, from 0.
        shares: number of shares.
        rows: number of first rows that are divided into shares; None is all.

    Raises:
        ConfigError: the dataset is empty, or a row cannot be read; the message names the path and the row.
    """
    data = open_saved(path, split)
    if not len(data):
        raise ConfigError(f"{path} is empty; a corpus holds at least one document.")
    for number in range(share, min(len(data), rows or len(data)), shares):
        try:
            row = data[number]
        except UNREADABLE as e:
            raise ConfigError(f"{path} row {number + 1} cannot be read: {reason(e)}") from e
        yield {**row, WHERE: f"{path} row {number + 1}"}


def find_files(source: Source) -> list[str] | None:
    """Return the files of a source in order; None if it is a saved dataset or on the Hub.

    Raises:
        ConfigError: there are none, one cannot be opened or is a pipe, or a split is asked of files.
    """
    try:
        files, wanted = _found(source.path)
    except (OSError, ValueError, ImportError) as e:
        raise ConfigError(f"data: cannot open '{source.path}': {reason(e)}") from e
    if files is None:
        return None
    if not files:
        raise ConfigError(f"data: '{source.path}' {wanted}.")
    if source.split not in (None, "train"):
        raise ConfigError(
            f"data: split '{source.split}' is asked of '{source.path}', but files have no splits. Name the "
            f"file, or those of the split with a glob."
        )
    for file in files:
        if "://" not in file and not stat.S_ISREG(os.stat(file).st_mode):
            raise ConfigError(
                f"data: '{file}' is no regular file but a pipe or a device, which is read only once. "
                f"Write its rows to a file first."
            )
    return files


def _found(path: str) -> tuple[list[str] | None, str]:
    """Return the files at a path, None for a dataset; and what to say is wrong if there are no files."""
    folder = Path(path)
    several = any(sign in path for sign in "*?[") and not folder.is_file()
    if folder.is_dir():
        if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
            return None, ""
        return _inside(
            folder
        ), f"holds no file with a suffix of {', '.join(SUFFIXED)} and is no saved dataset"
    if "://" in path or several or folder.exists() or suffix(path) in SUFFIXED:
        system, inner = fsspec.core.url_to_fs(path)
        names = sorted(system.glob(inner)) if several else [inner] * system.exists(inner)
        files = [system.unstrip_protocol(name) if "://" in path else name for name in names]
        return files, "matches no file" + ("" if "://" in path else f" (looked from {Path.cwd()})")
    return None, ""


def _inside(folder: Path) -> list[str]:
    """Return the files of a folder, without hidden ones (of editors and tools), and of one split only."""
    files, splits = list[str](), set[str]()
    for file in sorted(_walk(folder)):
        name = file.relative_to(folder)
        if suffix(file.name) in SUFFIXED and not any(part.startswith(".") for part in name.parts):
            files.append(str(file))
            splits.update(_SPLIT.findall(str(name).lower())[:1])
    if len(splits) > 1:
        raise ConfigError(
            f"data: '{folder}' holds files of several splits ({', '.join(sorted(splits))}), which would be "
            f"read together. Name those of one with a glob, such as '{folder}/**/*train*'."
        )
    return files


def _walk(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder; a folder that cannot be read is an error."""

    def fail(error: OSError) -> None:
        raise error

    for root, _, names in os.walk(folder, onerror=fail):
        yield from (Path(root) / name for name in names)


def open_saved(path: str, split: str | None) -> Dataset:
    """Open a split of what ``Dataset.save_to_disk`` wrote.

    Raises:
        ConfigError: it cannot be opened, or has no such split, or several and none is named.
    """
    try:
        saved: Dataset | DatasetDict = load_from_disk(path)
    except IndexError as e:  # what datasets makes of one without a row
        raise ConfigError(f"{path} is empty; a corpus holds at least one document.") from e
    except (*UNREADABLE, KeyError) as e:
        raise ConfigError(f"data: the saved dataset '{path}' cannot be opened: {reason(e)}") from e
    if isinstance(saved, Dataset):
        return saved
    return saved[_choose(path, split, list(saved))]


def _hub(source: Source) -> IterableDataset:
    try:
        data: IterableDataset | IterableDatasetDict = load_dataset(
            source.path, source.name, split=source.split, streaming=True
        )
    except (*UNREADABLE, KeyError, RuntimeError) as e:
        asked = f" (split '{source.split}')" if source.split else ""
        raise ConfigError(
            f"data: '{source.path}'{asked} is no file here and cannot be opened as a dataset: {reason(e)}"
        ) from e
    if isinstance(data, IterableDatasetDict):
        return data[_choose(source.path, None, list(data))]
    return data


def _choose(path: str, split: str | None, splits: list[str]) -> str:
    """Return the split that is asked for, or the only one."""
    if split is None and len(splits) != 1:
        raise ConfigError(
            f"data: '{path}' has the splits {', '.join(splits)}. Name one: 'split' of the source, or --split."
        )
    if split is not None and split not in splits:
        raise ConfigError(f"data: '{path}' has no split '{split}', only {', '.join(splits)}.")
    return split or splits[0]
