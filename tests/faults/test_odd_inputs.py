"""Inputs that are not what their names promise: one message that names the file and the mend, and no hang."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from src.cli import main
from src.data.judging import read_rows
from src.data.options import sources
from src.data.sources import Source, open_source
from src.errors import ConfigError
from tests.data_tools import byte_tokenizer, corpus, write_rows

SECONDS = 60  # on a busy machine; a hang is for ever


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    def stop(_: int, __: FrameType | None) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------------- data


ARRAY = json.dumps([{"text": "abc " * 9}] * 40)
PRETTY = json.dumps([{"text": "abc " * 9}] * 40, indent=2)
ROW = '{"text": "abc"}\n'
FILES: dict[str, tuple[str, bytes, str]] = {
    "array on a line": (
        "a.jsonl",
        ARRAY.encode(),
        r"row 1 is not JSON: the file is one array.*jq -c '\.\[\]'",
    ),
    "array, pretty": ("a.json", PRETTY.encode(), r"row 1 is not JSON: the file is one array"),
    "array behind blanks": (
        "a.json",
        b"\n\n  " + PRETTY.encode(),
        r"row 3 is not JSON: the file is one array",
    ),
    "array of 9 MiB on a line": (
        "a.json",
        b"[" + b'{"text": "x"}, ' * 700_000,
        r"8 MiB.*the file is one array",
    ),
    "array of 9 MiB, pretty": ("a.json", b"[\n" + b'{"text": "x"},\n' * 700_000, r"the file is one array"),
    "object on several lines": ("a.json", b'{\n  "text": "abc"\n}\n', r"row 1 is not JSON: .* several lines"),
    "UTF-16": ("a.jsonl", ROW.encode("utf-16"), r"row 1 is not UTF-8 but UTF-16\. Convert"),
    "UTF-16, unmarked": ("a.jsonl", ROW.encode("utf-16-le"), r"row 1 is not UTF-8 but UTF-16 or UTF-32"),
    "UTF-16 text": ("a.txt", "abc\ndef\n".encode("utf-16"), r"row 1 is not UTF-8 but UTF-16"),
    "UTF-16 text, unmarked": (
        "a.txt",
        "abc\ndef\n".encode("utf-16-be"),
        r"is not UTF-8 but UTF-16 or UTF-32",
    ),
    "UTF-32 text": ("a.txt", "abc\n".encode("utf-32"), r"is not UTF-8 but UTF-16"),
    "binary": ("a.txt", bytes(range(256)) * 9, r"row 1 is not UTF-8"),
    "binary JSONL": ("a.jsonl", b"\x7fELF\x02\x01\x00\x00\n", r"row 1 is not UTF-8"),
    "binary Parquet": ("a.parquet", bytes(range(256)) * 9, r"cannot be read after row 0"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_something_else_says_what_it_is(tmp_path: Path, case: str) -> None:
    name, content, message = FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        read_rows(str(tmp_path / name))
    assert "\n" not in str(error.value)
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize(
    "form", ["fifo", "glob of a fifo", "device", "device of a format", "link to a device"]
)
def test_a_pipe_or_a_device_is_refused_and_not_waited_for(tmp_path: Path, form: str) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    source = {
        "fifo": Source(str(tmp_path / "a.jsonl")),
        "glob of a fifo": Source(str(tmp_path / "*.jsonl")),
        "device": Source("/dev/zero"),
        "device of a format": Source("/dev/zero", format="text"),
        "link to a device": Source(str(tmp_path / "zero.txt")),
    }
    with pytest.raises(ConfigError, match=r"'.+' is no regular file but a pipe or a device.*Write its rows"):
        open_source(source[form], 0, 1)


@pytest.mark.parametrize("inside", [False, True])
def test_a_folder_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    """Root may read everything, so the refusal of the system is played; a part left out would be silent."""
    folder = tmp_path / "data"
    (folder / "shut").mkdir(parents=True)
    write_rows(folder / "a.jsonl", [{"text": "abc"}])
    shut, scandir = str(folder / "shut" if inside else folder), os.scandir

    def scan(path: Any) -> Any:
        if str(path) == shut:
            raise PermissionError(13, "Permission denied", shut)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    with pytest.raises(ConfigError, match=r"data: cannot open '.*data': .*Permission denied"):
        open_source(Source(str(folder)), 0, 1)


@pytest.mark.parametrize("path", ["a\0b.jsonl", "x" * 5000 + ".jsonl", "x" * 5000])
def test_an_impossible_path_is_one_message(path: str) -> None:
    with pytest.raises(ConfigError, match="data: "):
        open_source(Source(path), 0, 1)


def test_text_keeps_its_indentation(tmp_path: Path) -> None:
    (tmp_path / "code.txt").write_bytes(b"def f():\r\n    return 1  \n\n\ttab\n   \nlast")
    rows = [row["text"] for row in read_rows(str(tmp_path / "code.txt"))]
    assert rows == ["def f():", "    return 1  ", "\ttab", "last"]


# ---------------------------------------------------------------------- splits


@pytest.fixture
def splits(tmp_path: Path) -> str:
    made = {
        name: Dataset.from_list([{"text": f"{name} {i}"} for i in range(3)]) for name in ("train", "test")
    }
    DatasetDict(made).save_to_disk(tmp_path / "both")
    DatasetDict({"dev": made["test"]}).save_to_disk(tmp_path / "one")
    return str(tmp_path / "both")


def test_what_is_judged_names_its_split_where_there_are_several(tmp_path: Path, splits: str) -> None:
    with pytest.raises(ConfigError, match=r"both' has the splits train, test\. Name one: .*--split"):
        read_rows(splits)
    with pytest.raises(ConfigError, match=r"has no split 'dev', only train, test"):
        read_rows(splits, split="dev")
    assert [row["text"] for row in read_rows(splits, split="test")] == ["test 0", "test 1", "test 2"]
    assert [row["text"] for row in read_rows(str(tmp_path / "one"))] == ["test 0", "test 1", "test 2"]


def test_a_validation_is_never_the_training_split_unasked(tmp_path: Path, splits: str) -> None:
    assert sources(splits, "data.train")[0].split == "train"
    data = corpus(tmp_path, splits, validation=splits)
    with pytest.raises(ConfigError, match="has the splits train, test"):
        next(iter(data.loader("validation", shuffle=False)))
    data = corpus(tmp_path, splits, validation=[{"path": splits, "split": "test"}])
    assert sum(len(batch["input_ids"]) for batch in data.loader("validation", shuffle=False)) == 3


def test_a_split_of_files_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "abc"}])
    with pytest.raises(ConfigError, match=r"split 'test' is asked of '.*', but files have no splits"):
        read_rows(path, split="test")


# ---------------------------------------------------------------------- settings


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)
SETTINGS: dict[str, tuple[bytes, str]] = {
    "UTF-16": ("model: x\n".encode("utf-16"), r"is not UTF-8 \(byte 0\)"),
    "UTF-16, unmarked": ("model: x\n".encode("utf-16-be"), r"is no YAML of plain values"),
    "Latin-1": (b"a: caf\xe9\n", r"is not UTF-8 \(byte 6\)"),
    "binary": (bytes(range(128, 256)) * 3, r"is not UTF-8"),
    "NUL": (b"a: \0b", r"is no YAML of plain values"),
    "an alias of itself": (b"model: &a {init_args: *a}\n", r"an alias .* refers to what it is a part of"),
    "a list of itself": (b"a: &a [1, [*a]]\n", r"an alias .* refers to what it is a part of"),
    "aliases without end": (LAUGHS.encode(), r"repeat more than 100,000 values"),
    "nested without end": (b"a: " + b"[" * 2_000, r"is nested too deeply|is no YAML"),
    "a list": (b"- a\n", r"holds a list; expected a mapping"),
    "a word": (b"hello", r"holds a str; expected a mapping"),
    "nothing": (b"", r"holds nothing; expected a mapping"),
    "a tab": (b"a:\n\tb: 1\n", r"is no YAML of plain values: .*\(line 2, column 1\)"),
    "a Python object": (b"a: !!python/object/apply:os.system ['false']\n", r"is no YAML of plain values"),
}


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("verb", ["fit", "predict", "preview", "plan"])
def test_a_file_of_settings_at_fault_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str, case: str
) -> None:
    content, message = SETTINGS[case]
    (tmp_path / "a.yaml").write_bytes(content)
    assert_refused(
        [verb, "--config", str(tmp_path / "a.yaml")], rf"--config: .*a\.yaml' .*{message}|{message}", capsys
    )


@pytest.mark.parametrize("form", ["fifo", "directory", "device", "link to a device"])
@pytest.mark.parametrize("verb", ["fit", "preview"])
def test_settings_are_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str, form: str
) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "link.yaml").symlink_to("/dev/zero")
    (tmp_path / "directory.yaml").mkdir()
    path = {"device": "/dev/zero", "link to a device": str(tmp_path / "link.yaml")}.get(
        form, str(tmp_path / f"{form}.yaml")
    )
    assert_refused([verb, f"--config={path}"], "is a directory, a pipe or a device; give a YAML file", capsys)


def test_settings_of_other_keys_are_read_as_carefully(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.yaml").write_bytes(b"a: &a [*a]\n")
    config = ["fit", "--config", "configs/search/gumbel_topk.yaml", "--data", str(tmp_path / "data.yaml")]
    assert_refused(config, r"--data: an alias of '.*data\.yaml' refers to", capsys)


def assert_refused(command: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(command)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("error: ")
    assert len(said.strip().splitlines()) == 1, said
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(said)


@pytest.mark.parametrize("batches", [0, -3])
def test_the_number_of_calibration_batches_is_blamed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], batches: int
) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "model")
    rows = write_rows(tmp_path / "a.jsonl", [{"text": "abc"}] * 9)
    config = "configs/search/gumbel_topk.yaml"
    command = ["fit", "--config", config, f"--model.init_args.model={tmp_path}/model",
               f"--data.init_args.train={rows}", f"--data.init_args.validation={rows}",
               f"--model.init_args.calibration_batches={batches}"]  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        main(command)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert "calibration_batches" in said
    assert str(batches) in said
