"""Teach fsspec to read zstd and LZ4 files, by the codecs that pyarrow brings."""

from __future__ import annotations

import io
from typing import Any, BinaryIO, cast

import pyarrow as pa
from fsspec.compression import available_compressions, register_compression

_CODECS = {"zstd": "zst", "lz4": "lz4"}

SUFFIXES = (".gz", ".bz2", ".xz", *(f".{suffix}" for suffix in _CODECS.values()))
"""Suffixes of files that are read through a decompressor."""


def register() -> None:
    """Let ``fsspec.open(..., compression="infer")`` read zstd and LZ4 files, unless it can by itself."""
    for codec, suffix in _CODECS.items():
        if codec not in available_compressions():
            register_compression(codec, _reader(codec), suffix)


def _reader(codec: str) -> Any:
    def opened(stream: BinaryIO, mode: str = "rb", **_: Any) -> BinaryIO:
        if not mode.startswith("r"):
            raise ValueError(f"{codec} is only read here, not opened as '{mode}'")
        return io.BufferedReader(cast(io.RawIOBase, pa.CompressedInputStream(stream, codec)))

    return opened
