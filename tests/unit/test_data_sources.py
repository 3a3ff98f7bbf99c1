"""Sources: every form of corpus reads the same, and every fault names its file and row."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from src.data import Source
from src.data.documents import MAX_DOCUMENT
from src.data.sources import WHERE, open_source
from src.errors import ConfigError
from tests.data_tools import arrow_compress, numbered, read, write_rows

ROWS = numbered(41)
TEXTS = sorted(row["text"] for row in ROWS)


def lines() -> bytes:
    return "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def written(folder: Path, form: str) -> Source:
    """The same rows in each form a source may have."""
    compress = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    compress |= {"zst": partial(arrow_compress, "zstd"), "lz4": partial(arrow_compress, "lz4")}
    if form in compress:
        (folder / f"a.jsonl.{form}").write_bytes(compress[form](lines()))
        return Source(str(folder / f"a.jsonl.{form}"))
    data = Dataset.from_list(ROWS)
    if form == "parquet":
        data.to_parquet(folder / "a.parquet")
    elif form == "saved":
        data.save_to_disk(folder / "data")
        return Source(str(folder / "data"))
    elif form == "saved splits":
        DatasetDict({"dev": data}).save_to_disk(folder / "data")
        return Source(str(folder / "data"), split="dev")
    elif form == "lines":
        (folder / "a.txt").write_text("\n\n".join(row["text"] for row in ROWS))
    elif form in ("directory", "glob"):
        for i in range(4):
            write_rows(folder / f"{i}.jsonl", ROWS[i::4])
        return Source(str(folder) if form == "directory" else str(folder / "*.jsonl"))
    elif form in ("jsonl", "file url"):
        (folder / "a.jsonl").write_bytes(lines())
    if form == "file url":
        return Source(f"file://{folder}/a.jsonl")
    if form == "named format":
        (folder / "a.data").write_bytes(lines())
        return Source(str(folder / "a.data"), format="jsonl")
    return Source(str(next(folder.glob("a.*"))))


FORMS = ["gz", "bz2", "xz", "zst", "lz4", "parquet", "saved", "saved splits", "lines", "directory", "glob"]
FORMS += ["file url", "named format"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shares", [1, 3, 4])
def test_shares_of_every_form_are_disjoint_and_complete(tmp_path, form, shares):
    source = written(tmp_path, form)
    seen = [row["text"][0] for i in range(shares) for row in open_source(source, i, shares).iter(1)]
    assert sorted(seen) == TEXTS


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shares", [1, 3, 4])
def test_the_first_rows_are_the_same_for_any_number_of_shares(tmp_path, form, shares):
    source = written(tmp_path, form)
    every = [row["text"][0] for row in open_source(source, 0, 1).iter(1)]
    first = replace(source, rows=7)
    seen = [row["text"][0] for i in range(shares) for row in open_source(first, i, shares).iter(1)]
    assert sorted(seen) == sorted(every[:7])


@pytest.mark.parametrize("form", ["gz", "zst", "parquet", "saved", "glob"])
@pytest.mark.parametrize("shares", [1, 3])
def test_position_is_exact(tmp_path, form, shares):
    source = written(tmp_path, form)
    data = open_source(source, 0, shares)
    rows = data.iter(1)
    for _ in range(5):
        next(rows)
    position = json.loads(json.dumps(data.state_dict()))
    again = open_source(source, 0, shares)
    again.load_state_dict(position)
    assert list(again.iter(1)) == list(rows)


class Quiet(SimpleHTTPRequestHandler):
    """Serves a directory; of what is called half it sends half, and breaks the connection."""

    def log_message(self, *_: Any) -> None:
        pass

    def copyfile(self, source: Any, outputfile: Any) -> None:
        whole = source.read()
        outputfile.write(whole[: len(whole) // 2] if "half" in self.path else whole)
        self.close_connection = True


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """The URL of ``tmp_path``."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("form", ["gz", "zst", "parquet", "jsonl", "lines"])
def test_a_url_reads_as_the_file(tmp_path, url, form):
    name = Path(written(tmp_path, form).path).name
    seen = [row["text"][0] for i in range(2) for row in open_source(Source(f"{url}/{name}"), i, 2).iter(1)]
    assert sorted(seen) == TEXTS


@pytest.mark.parametrize("form", ["gz", "jsonl"])
def test_a_connection_that_breaks_names_the_file(tmp_path, url, form):
    file = Path(written(tmp_path, form).path)
    file.rename(file.with_name(f"half_{file.name}"))
    with pytest.raises(
        ConfigError, match=rf"half_{file.name} cannot be read after row \d+: Response payload"
    ):
        read(tmp_path, f"{url}/half_{file.name}")


def test_a_file_may_be_one_document(tmp_path):
    (tmp_path / "book.txt").write_text("one\n\ntwo\n")
    (row,) = open_source(Source(str(tmp_path / "book.txt"), format="text"), 0, 1).iter(1)
    assert row["text"] == ["one\n\ntwo\n"]
    assert row[WHERE][0].endswith("book.txt row 1")


@pytest.mark.parametrize("character", ["x", "\u201c", "\u6545"])
def test_a_file_as_a_document_is_whole_or_refused(tmp_path, character):
    """Bytes are counted: a cut text of more bytes than characters would pass for a whole one."""
    file = tmp_path / "book.txt"
    source = Source(str(file), format="text")
    for size in (MAX_DOCUMENT, MAX_DOCUMENT + 3):
        text = character * (size // len(character.encode()))
        file.write_text(text)
        if size == MAX_DOCUMENT:
            (row,) = open_source(source, 0, 1).iter(1)
            assert row["text"] == [text]
        else:
            with pytest.raises(ConfigError, match=r"book\.txt row 1 is a document of more than 8 MiB"):
                list(open_source(source, 0, 1))


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert [row["text"] for row in open_source(Source(str(tmp_path / "a.txt")), 0, 1).iter(1)] == [
        ["one"],
        ["two"],
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_blank_lines_are_dealt_to_nobody(tmp_path, suffix):
    """Shares of one file differ by one document at most, also where each second line is blank."""
    lines = [json.dumps(row) if suffix == "jsonl" else row["text"] for row in ROWS]
    (tmp_path / f"a.{suffix}").write_text("\n\n".join(lines))
    source = Source(str(tmp_path / f"a.{suffix}"))
    shares = [[row["text"] for row in open_source(source, i, 8)] for i in range(8)]
    assert sorted(text for share in shares for text in share) == TEXTS
    assert {len(share) for share in shares} == {5, 6}
