"""Read the rows of files one by one, in each format; files are local or remote, compressed or not.

Each row says under the key :data:`WHERE` where it comes from, so that an error message can name the file and
the row.
"""

from __future__ import annotations

import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import aiohttp
import fsspec
import pyarrow as pa
import pyarrow.parquet
from datasets.exceptions import DatasetsError

from src.data.compression import SUFFIXES, register
from src.errors import ConfigError, did_you_mean

Row = dict[str, Any]
Format = Literal["jsonl", "parquet", "lines", "text"]

WHERE = "__where__"
"""Key under which a row says where it comes from."""

MAX_DOCUMENT = 8 << 20
"""Most bytes of a line and characters of a document; what is longer is taken for a file without newlines."""

SUFFIXED: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".txt": "lines",
}
"""Formats by the suffix of a file."""
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
register()  # zstd and LZ4


def read_files(
    files: Iterable[tuple[int, str]],
    share: int,
    shares: int,
    format: Format | None = None,
    most: int | None = None,
) -> Iterator[Row]:
    """Yield the rows of one share of some files: every ``shares``-th row.

    A row says under the key ``WHERE`` where it comes from.

    Args:
        files: a number, such as its place in a list, and the path or URL of each file. The number shifts
            which of the file's rows are in the share; else one share would get the first row of every file.
        share: number of the share, from 0.
        shares: into how many disjoint shares the rows are dealt.
        format: format of the files; None tells it from their suffixes.
        most: number of rows, of all shares together, after which the reading ends; None reads all.

    Raises:
        ConfigError: a file is empty or damaged, or a row is not what its format promises; the message
            names the file and the row.
    """
    read = 0
    for number, file in files:
        rows, parse = _READERS[format or _format(file)]
        last = 0
        try:
            for nth, (last, raw) in enumerate(rows(file), start=1):  # rows count, blank lines do not
                if read == most:
                    return
                read += 1
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


def reason(error: Exception) -> str:
    """Return the first line of an error's message that is not blank; its ``repr`` if there is none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))


def _lines(file: str) -> Iterator[tuple[int, bytes]]:
    """Yield numbered lines that are not blank, without their ends."""
    # Remote files of fsspec read no line of limited length; a buffered reader of them does.
    with fsspec.open(file, "rb", compression="infer") as opened, io.BufferedReader(opened) as stream:
        number = 0
        while line := stream.readline(MAX_DOCUMENT + 1):
            number += 1
            _check_text(file, number, line)
            if len(line) > MAX_DOCUMENT:
                array = f" Or {_ARRAY}" if line.lstrip().startswith(b"[") else ""
                raise ConfigError(
                    f"{file} row {number} is one line of more than {MAX_DOCUMENT >> 20} MiB. A row is one "
                    f"document: split it.{array}"
                )
            if line.strip():
                yield number, line.rstrip(b"\r\n")


def _objects(file: str) -> Iterator[tuple[int, bytes]]:
    """Yield numbered lines of JSON objects, not those of an array or of an object on several lines."""
    for nth, (number, line) in enumerate(_lines(file)):
        bare = line.strip().removeprefix(b"\xef\xbb\xbf")
        if nth == 0 and bare.startswith(b"["):
            raise ConfigError(f"{file} row {number} is not JSON: {_ARRAY}")
        if nth == 0 and bare == b"{":
            raise ConfigError(f"{file} row {number} is not JSON: an object on several lines. {_WRITE}")
        yield number, line


_WRITE = "A row is one object on one line: jq -c . FILE > FILE.jsonl"
_ARRAY = "the file is one array. A row is one object on one line: jq -c '.[]' FILE > FILE.jsonl"


def _check_text(file: str, number: int, text: bytes) -> None:
    """Refuse what is no UTF-8 though it may be decoded as such."""
    wide = number == 1 and text[:2] in (b"\xff\xfe", b"\xfe\xff")
    if wide or b"\0" in text:
        kind = "UTF-16" if wide else "UTF-16 or UTF-32, or no text"
        raise ConfigError(f"{file} row {number} is not UTF-8 but {kind}. Convert the file with iconv.")


def _whole(file: str) -> Iterator[tuple[int, bytes]]:
    with fsspec.open(file, "rb", compression="infer") as stream:
        text = stream.read(MAX_DOCUMENT + 1)
    if len(text) > MAX_DOCUMENT:
        raise ConfigError(
            f"{file} row 1 is a document of more than {MAX_DOCUMENT >> 20} MiB. Split the file, or set "
            "'format' of the source to 'lines' if each line is one document."
        )
    _check_text(file, 1, text)
    if text.strip():
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
    "jsonl": (_objects, json.loads),
    "lines": (_lines, _text),
    "text": (_whole, _text),
    "parquet": (_parquet, _same),
}


def suffix(file: str) -> str:
    """Return the suffix that tells the format of a file, without that of a compression."""
    path = Path(file)
    return path.with_suffix("").suffix if path.suffix in SUFFIXES else path.suffix


def _format(file: str) -> Format:
    ending = suffix(file)
    if ending not in SUFFIXED:
        known = ", ".join([*SUFFIXED, *(f".jsonl{c}" for c in SUFFIXES)])
        raise ConfigError(
            f"{file}: the suffix '{ending}' does not say what the file holds; known: {known}. "
            f"Set 'format' of the source.{did_you_mean(ending, SUFFIXED)}"
        )
    return SUFFIXED[ending]


def _kind(value: Any) -> str:
    return {"NoneType": "null", "str": "text", "list": "a list", "dict": "an object"}.get(
        type(value).__name__, f"of type {type(value).__name__}"
    )
