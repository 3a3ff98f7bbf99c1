"""Corpora at fault: one message that names the file and row, or the key, from a worker too."""

from __future__ import annotations

import gzip
import json
import math
from functools import partial
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, load_dataset

from src.data import Columns, Source
from src.data.documents import MAX_DOCUMENT
from src.errors import ConfigError
from tests.data_tools import arrow_compress, corpus, numbered, read, write_rows

GOOD = [{"text": "good"}] * 3
FAULTS: dict[str, tuple[bytes, str]] = {
    "missing column": (b'{"text": "a"}\n{"story": "b"}\n', r"a\.jsonl row 2 lacks .*found: 'story'.*columns"),
    "null": (b'{"text": "a"}\n{"text": null}\n', r"row 2: column 'text' holds null; expected text"),
    "mixed types": (b'{"text": "a"}\n{"text": 7}\n', r"row 2: column 'text' holds int '7'; expected text"),
    "not an object": (b'{"text": "a"}\n["b"]\n', r"row 2 is a list, not an object"),
    "empty file": (b"", r"a\.jsonl is empty"),
    "blank file": (b"\n\n", r"a\.jsonl is empty"),
    "not JSON": (b'{"text": "a"}\n{"text": "b"\n', r"row 2 is not JSON"),
    "an array": (b'[\n{"text": "a"}\n]\n', r"row 1 is not JSON"),
    "not UTF-8": (b'{"text": "a"}\n{"text": "\xff"}\n', r"row 2 is not UTF-8.*byte 10"),
    "nested without end": (
        b'{"text": "a"}\n{"text": ' + b"[" * 99_999 + b"\n",
        r"after row 2: maximum recursion",
    ),
    "half a surrogate": (b'{"text": "\\ud800"}\n', r"row 1: .*half of a surrogate pair"),
    "a long line": (b'{"text": "' + b"x" * 10_000_000 + b'"}\n', r"row 1 is one line of more than 8 MiB"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_names_file_and_row(tmp_path, fault):
    content, message = FAULTS[fault]
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        read(tmp_path, str(tmp_path / "a.jsonl"))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("fault", ["mixed types", "not UTF-8"])
def test_a_worker_fails_with_its_cause(tmp_path, fault):
    content, message = FAULTS[fault]
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        read(tmp_path, str(tmp_path / "a.jsonl"), num_workers=2)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["truncated", "damaged", "not compressed"])
@pytest.mark.parametrize("suffix", ["gz", "zst", "lz4"])
def test_broken_compression(tmp_path, suffix, kind):
    compress = {
        "gz": gzip.compress,
        "zst": partial(arrow_compress, "zstd"),
        "lz4": partial(arrow_compress, "lz4"),
    }
    whole = compress[suffix](
        b"".join(json.dumps({"text": f"{i} " * 99}).encode() + b"\n" for i in range(999))
    )
    middle = len(whole) // 2
    broken = {
        "truncated": whole[:middle],
        "damaged": whole[:middle] + b"\0" * 64 + whole[middle + 64 :],
        "not compressed": b'{"text": "a"}\n',
    }
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(broken[kind])
    with pytest.raises(ConfigError, match=rf"a\.jsonl\.{suffix} (cannot be read after row|row) \d+"):
        read(tmp_path, str(tmp_path / f"a.jsonl.{suffix}"))


def test_broken_parquet(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ConfigError, match=r"a\.parquet cannot be read after row 0"):
        read(tmp_path, str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", ["null", "damaged", "empty", "no split"])
def test_a_fault_of_a_saved_dataset_names_the_row_of_the_whole(tmp_path, fault, workers):
    folder = tmp_path / "data"
    rows = Dataset.from_list(
        [{"text": f"row {i}"} for i in range(200)] + [{"text": None}] * (fault == "null")
    )
    if fault == "no split":
        DatasetDict({"dev": rows, "test": rows}).save_to_disk(folder)
    else:
        rows.select([] if fault == "empty" else range(len(rows))).save_to_disk(folder)
    if fault == "damaged":
        (file,) = folder.glob("*.arrow")
        content = file.read_bytes()
        file.write_bytes(content.replace(b"row 150", b"row \xff50"))
    message = {
        "null": "data row 201: column 'text' holds null",
        "damaged": "data row 151 cannot be read: 'utf-8' codec",
        "empty": "data is empty",
        "no split": "has no split 'train', only dev, test",
    }
    with pytest.raises(ConfigError, match=message[fault]):
        read(tmp_path, str(folder), num_workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fault_on_the_hub_names_the_data_set(tmp_path, monkeypatch, workers):
    """Its rows are read by ``datasets``, whose errors are not a user's: here a file stands for the Hub."""
    path = tmp_path / "a.jsonl"
    path.write_bytes("".join(json.dumps(row) + "\n" for row in numbered(41)).encode() + b"{broken\n")
    streamed = load_dataset("json", data_files=str(path), split="train", streaming=True)
    monkeypatch.setattr("src.data.sources.load_dataset", lambda *_, **__: streamed)
    with pytest.raises(
        ConfigError, match=r"org/name \(split 'train'\), share 1/4, cannot be read after row 0: .*JSON"
    ):
        read(tmp_path, "org/name", num_workers=workers)


def test_a_long_document_is_cut_split_or_refused(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "short"}, {"text": "x" * 100}])
    with pytest.raises(ConfigError, match=r"row 2 has 10[12] tokens, more than data.max_length=64"):
        read(tmp_path, path, too_long="error")
    assert "".join(read(tmp_path, path, too_long="split")).count("x") == 100
    assert max(map(len, read(tmp_path, path))) <= 64


def test_a_document_beyond_all_measure_is_refused(tmp_path):
    Dataset.from_list([{"text": "x" * (MAX_DOCUMENT + 1)}]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"row 1: column 'text' holds 8,388,609 characters"):
        read(tmp_path, str(tmp_path / "a.parquet"))


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "zero weight": (
        {"train": [Source("a.jsonl", weight=0.0), Source("b.jsonl", weight=1.0)]},
        r"data\.train: 'a\.jsonl' has weight 0\.0",
    ),
    "weight as text": (
        {"train": [{"path": "a.jsonl", "weight": "much"}]},
        r"data\.train: 'a\.jsonl' has weight much; a weight is a positive number",
    ),
    "half weighted": ({"train": [Source("a.jsonl", weight=1.0), "b.jsonl"]}, r"'b\.jsonl' has no weight"),
    "workers": ({"num_workers": 3}, r"data\.num_workers is 3; accepted: \[0, 1, 2, 4\]"),
    "held out": ({"held_out": 1.5}, r"held_out: 1\.5 given; accepted: a number from 0 and below 1"),
    "two validations": ({"held_out": 0.1, "validation": "v.jsonl"}, "both set"),
    "endless weight": ({"train": [{"path": "a.jsonl", "weight": math.inf}]}, r"has weight inf"),
    "format": (
        {"train": [{"path": "a.jsonl", "format": "csv"}]},
        r"'a\.jsonl' has format 'csv'; accepted: jsonl, parquet, lines, text",
    ),
    "path": ({"train": [{"path": 3}]}, r"data\.train: 'path' of a part of the mixture is 3; expected text"),
    "part": ({"train": ["a.jsonl", None]}, r"data\.train: a part of the mixture is None"),
    "endless tokens": ({"max_tokens": "1e999"}, "data.max_tokens: '1e999' given"),
    "two suffixes": ({"max_tokens": "5KM"}, "data.max_tokens: '5KM' given"),
    "tokens": ({"max_tokens": "many"}, "data.max_tokens: 'many' given"),
    "batch": ({"batch_size": 0}, "batch_size: 0 given; accepted: a whole number above 0"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_at_fault_name_their_key(tmp_path, case):
    options, message = SETTINGS[case]
    with pytest.raises(ConfigError, match=message):
        corpus(tmp_path, **{"train": "a.jsonl", **options})


@pytest.mark.parametrize("names", [{"prompt": "q"}, {"text": "t", "messages": "m"}])
def test_columns_at_fault(names):
    with pytest.raises(ConfigError, match="give 'text', or 'prompt' and 'answer', or 'messages'"):
        Columns(**names)


def test_several_faults_are_told_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"batch_size: 0 given.*max_length: 1 given"):
        corpus(tmp_path, "a.jsonl", max_length=1, batch_size=0)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.jsonl", r"'missing\.jsonl' matches no file \(looked from"),
        ("nothing/*.jsonl", "matches no file"),
        ("empty", "holds no file"),
        ("a.unknown", r"suffix '\.unknown' does not say.*'format'"),
    ],
)
def test_a_path_to_nothing(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.unknown").write_text("x")
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, path)


def test_a_folder_is_read_without_hidden_files_and_never_of_two_splits(tmp_path):
    """A clone of a data set holds its test split beside the training one."""
    folder = tmp_path / "protest-data"
    for name in ("train/a.jsonl", "train/latest.jsonl", ".cache/train.jsonl", ".hidden.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_rows(folder / name, [{"text": name}])
    assert sorted(read(tmp_path, str(folder))) == ["train/a.jsonl", "train/latest.jsonl"]
    for name in ("test-00000-of-00001.jsonl", "data/validation.jsonl", "eval.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        write_rows(folder / name, [{"text": name}])
        with pytest.raises(
            ConfigError, match=r"protest-data' holds files of several splits \((\w+, train|train, \w+)\)"
        ):
            read(tmp_path, str(folder))
        (folder / name).unlink()


def test_an_unknown_hub_id(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"'nobody/nothing' \(split 'train'\) is no file here"):
        read(tmp_path, "nobody/nothing")


def test_a_corpus_without_anything_to_learn(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": ""}] * 3)
    with pytest.raises(ConfigError, match=r"no document has a token to learn from: 3 were left out"):
        read(tmp_path, path, bos=False)
