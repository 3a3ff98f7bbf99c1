"""Where documents come from: files, the Hub and saved datasets, as one kind of stream.

Every source becomes a ``datasets.IterableDataset`` of rows, whose position can be saved and
restored. Files are read row by row, local or remote, compressed or not, and never stored whole;
their rows carry ``WHERE``, so that every later complaint can name the file and the row.
"""

from __future__ import annotations

import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import aiohttp
import fsspec
import pyarrow as pa
import pyarrow.parquet
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from datasets.distributed import split_dataset_by_node
from datasets.exceptions import DatasetsError

from src.data.compression import SUFFIXES, register
from src.errors import ConfigError, did_you_mean

Row = dict[str, Any]
Format = Literal["jsonl", "parquet", "lines", "text"]

WHERE = "__where__"
"""Key under which a row says where it comes from."""

MAX_DOCUMENT = 8 << 20
"""Bytes of the longest line and characters of the longest document: beyond it a newline is
missing."""

_SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".txt": "lines",
}
UNREADABLE = (
    OSError,
    EOFError,
    RecursionError,
    ValueError,
    aiohttp.ClientError,
    ImportError,
    zlib.error,
    lzma.LZMAError,
    pa.ArrowException,
    DatasetsError,
)
"""What libraries raise over damaged or unreachable data."""
_SPLIT = re.compile("(?<![a-z])(train|test|val|dev|eval)(?:ing|id|idation|uation)?(?![a-z])")
register()  # zstd and LZ4


@dataclass(frozen=True)
class Source:
    """One corpus, or one part of a mixture.

    Args:
        path: a Hub id; a file, glob, directory or URL of JSONL, Parquet or text, compressed or not;
            or a directory written by ``Dataset.save_to_disk``.
        weight: share of the documents drawn from this part. Give one to every part or to none:
            without weights an epoch holds every document once; with weights a part that runs out
            starts again, and the epoch ends when each part has been read to its end.
        split: split of a Hub or saved dataset.
        name: configuration of a Hub dataset.
        format: format of the files where the suffix does not tell; ``lines`` (the meaning of
            ``.txt``) makes a document of each line, ``text`` of each file.
    """

    path: str
    weight: float | None = None
    split: str = "train"
    name: str | None = None
    format: Format | None = None


def open_source(source: Source, share: int, shares: int) -> IterableDataset:
    """Open share ``share`` of ``shares`` of a source; the shares are disjoint and complete.

    Whole files are dealt out where their number allows it, else single rows.

    Raises:
        ConfigError: there is no such file or dataset.
    """
    files = _files(source)
    if files is None and Path(source.path).is_dir():
        _saved(source.path, source.split)  # complains now rather than at the first row
        saved = {"path": source.path, "split": source.split, "share": share, "shares": shares}
        return IterableDataset.from_generator(read_saved, gen_kwargs=saved)
    if files is None:
        return split_dataset_by_node(_hub(source), rank=share, world_size=shares)
    if len(files) % shares == 0:
        files, share, shares = files[share::shares], 0, 1
    keys = {"files": list(enumerate(files)), "share": share, "shares": shares}
    return IterableDataset.from_generator(read_files, gen_kwargs={**keys, "format": source.format})


def read_files(
    files: list[tuple[int, str]], share: int, shares: int, format: Format | None = None
) -> Iterator[Row]:
    """Yield every ``shares``-th row of numbered files, each with its ``WHERE``.

    Raises:
        ConfigError: a file is empty or damaged, or a row is not what its format promises; names
            both.
    """
    for number, file in files:
        rows, parse = _READERS[format or _format(file)]
        last = 0
        try:
            for nth, (last, raw) in enumerate(rows(file), start=1):  # rows count, blank lines do not
                if (number + nth) % shares == share:
                    row = parse(raw)
                    if not isinstance(row, dict):
                        raise ConfigError(f"{file} row {last} is {_kind(row)}, not an object.")
                    yield {**row, WHERE: f"{file} row {last}"}
        except ConfigError:
            raise
        except UnicodeDecodeError as e:
            raise ConfigError(f"{file} row {last} is not UTF-8: {e.reason}, byte {e.start}.") from e
        except json.JSONDecodeError as e:
            raise ConfigError(f"{file} row {last} is not JSON: {e.msg}, column {e.colno}.") from e
        except UNREADABLE as e:
            raise ConfigError(f"{file} cannot be read after row {last}: {reason(e)}") from e
        if last == 0:
            raise ConfigError(f"{file} is empty; a corpus holds at least one document.")


def read_saved(path: str, split: str, share: int, shares: int) -> Iterator[Row]:
    """Yield every ``shares``-th row of a saved dataset, each with its ``WHERE``.

    Raises:
        ConfigError: it is empty, or a row cannot be read; names both.
    """
    data = _saved(path, split)
    if not len(data):
        raise ConfigError(f"{path} is empty; a corpus holds at least one document.")
    for number in range(share, len(data), shares):
        try:
            row = data[number]
        except UNREADABLE as e:
            raise ConfigError(f"{path} row {number + 1} cannot be read: {reason(e)}") from e
        yield {**row, WHERE: f"{path} row {number + 1}"}


def reason(error: Exception) -> str:
    """The first line of an error's message, or its kind."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))


def _lines(file: str) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank."""
    # Remote files of fsspec read no line of limited length; a buffered reader of them does.
    with fsspec.open(file, "rb", compression="infer") as opened, io.BufferedReader(opened) as stream:
        number = 0
        while line := stream.readline(MAX_DOCUMENT + 1):
            number += 1
            if len(line) > MAX_DOCUMENT:
                raise ConfigError(
                    f"{file} row {number} is one line of more than {MAX_DOCUMENT >> 20} MiB. A "
                    "row is one document: split it, or write one JSON object to a line if this "
                    "is an array."
                )
            if line := line.strip():
                yield number, line


def _whole(file: str) -> Iterator[tuple[int, bytes]]:
    with fsspec.open(file, "rb", compression="infer") as stream:
        text = stream.read(MAX_DOCUMENT + 1)
    if len(text) > MAX_DOCUMENT:
        raise ConfigError(
            f"{file} row 1 is a document of more than {MAX_DOCUMENT >> 20} MiB. Split the file, or set "
            "'format' of the source to 'lines' if each line is one document."
        )
    if text:
        yield 1, text


def _parquet(file: str) -> Iterator[tuple[int, Row]]:
    with fsspec.open(file, "rb") as stream:
        number = 0
        for batch in pa.parquet.ParquetFile(stream).iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row


def _text(line: bytes) -> Row:
    return {"text": line.decode("utf-8-sig")}


def _same(row: Row) -> Row:
    return row


_READERS: dict[Format, tuple[Callable[[str], Iterator[tuple[int, Any]]], Callable[[Any], Any]]] = {
    "jsonl": (_lines, json.loads),
    "lines": (_lines, _text),
    "text": (_whole, _text),
    "parquet": (_parquet, _same),
}


def _suffix(file: str) -> str:
    path = Path(file)
    return path.with_suffix("").suffix if path.suffix in SUFFIXES else path.suffix


def _format(file: str) -> Format:
    suffix = _suffix(file)
    if suffix not in _SUFFIXES:
        known = ", ".join([*_SUFFIXES, *(f".jsonl{c}" for c in SUFFIXES)])
        raise ConfigError(
            f"{file}: the suffix '{suffix}' does not say what the file holds; known: {known}. "
            f"Set 'format' of the source.{did_you_mean(suffix, _SUFFIXES)}"
        )
    return _SUFFIXES[suffix]


def _files(source: Source) -> list[str] | None:
    """The files of a source in order; None if it is a saved dataset or on the Hub."""
    path, folder = source.path, Path(source.path)
    several = any(sign in path for sign in "*?[") and not folder.is_file()
    if folder.is_dir():
        if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
            return None
        files = _inside(folder)
        wanted = f"holds no file with a suffix of {', '.join(_SUFFIXES)} and is no saved dataset"
    elif "://" in path or several or folder.is_file() or _suffix(path) in _SUFFIXES:
        try:
            system, inner = fsspec.core.url_to_fs(path)
            names = sorted(system.glob(inner)) if several else [inner] * system.exists(inner)
            files = [system.unstrip_protocol(n) if "://" in path else n for n in names]
        except (OSError, ValueError, ImportError) as e:
            raise ConfigError(f"data: cannot open '{path}': {reason(e)}") from e
        wanted = "matches no file" + ("" if "://" in path else f" (looked from {Path.cwd()})")
    else:
        return None
    if not files:
        raise ConfigError(f"data: '{path}' {wanted}.")
    return files


def _inside(folder: Path) -> list[str]:
    """The files of a folder, without hidden ones (of editors and tools), and of one split only."""
    files, splits = list[str](), set[str]()
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if _suffix(file.name) in _SUFFIXES and not any(part.startswith(".") for part in name.parts):
            files.append(str(file))
            splits.update(_SPLIT.findall(str(name).lower())[:1])
    if len(splits) > 1:
        raise ConfigError(
            f"data: '{folder}' holds files of several splits ({', '.join(sorted(splits))}), which would be "
            f"read together. Name those of one with a glob, such as '{folder}/**/*train*'."
        )
    return files


def _saved(path: str, split: str) -> Dataset:
    try:
        saved: Dataset | DatasetDict = load_from_disk(path)
    except IndexError as e:  # what datasets makes of one without a row
        raise ConfigError(f"{path} is empty; a corpus holds at least one document.") from e
    except (*UNREADABLE, KeyError) as e:
        raise ConfigError(f"data: the saved dataset '{path}' cannot be opened: {reason(e)}") from e
    if isinstance(saved, Dataset):
        return saved
    if split not in saved:
        raise ConfigError(f"data: '{path}' has no split '{split}', only {', '.join(saved)}.")
    return saved[split]


def _hub(source: Source) -> IterableDataset:
    try:
        return load_dataset(source.path, source.name, split=source.split, streaming=True)
    except (*UNREADABLE, KeyError, RuntimeError) as e:
        raise ConfigError(
            f"data: '{source.path}' (split '{source.split}') is no file here and cannot be opened "
            f"as a dataset: {reason(e)}"
        ) from e


def _kind(value: Any) -> str:
    return {"NoneType": "null", "str": "text", "list": "a list", "dict": "an object"}.get(
        type(value).__name__, f"of type {type(value).__name__}"
    )
