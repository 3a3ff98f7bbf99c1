"""Writing a cache: the same rows whatever happens, and one message when they would not be."""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Trainer

from src.cache import Cache, CacheTeacher, CacheWriter
from src.cache.shards import Rows
from src.errors import ConfigError
from src.models.loading import Quantization
from tests.cached import BARE, Workspace, small

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def whole(ws: Workspace) -> str:
    return ws.write("whole")


def contents(path: str) -> dict[str, bytes]:
    """Every file of a cache with its bytes, so that equality is equality of rows, order and manifest."""
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(Path(path).rglob("*")) if f.is_file()}


def in_child(work: Callable[[], object]) -> int:
    """Start ``work`` in a forked process, silently; its id."""
    pid = os.fork()
    if pid == 0:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 1)
            os.dup2(null.fileno(), 2)
        try:
            work()
        finally:
            os._exit(0)
    return pid


def test_a_cache_has_several_shards_and_every_document_once(ws: Workspace, whole: str) -> None:
    cache = Cache(whole)
    rows = Rows.concatenate([cache.read(i) for i in range(len(cache.shards))])
    assert len(cache.shards) > 2
    assert len(rows.lengths) == 48
    assert (rows.lengths - 1 == rows.counts).all()
    documents = [
        ids[mask == 1].tolist()
        for batch in ws.corpus().predict_dataloader()
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert [part.tolist() for part in np.split(rows.tokens, rows.lengths.cumsum()[:-1])] == documents


@pytest.mark.slow
def test_twenty_kills_leave_the_rows_of_an_uninterrupted_write(
    ws: Workspace, whole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each some milliseconds after a random batch: in the teacher, in Parquet, between files."""
    rng, kills, original = random.Random(0), 0, CacheWriter.write_on_batch_end

    def work(out: str, victim: int, delay: float) -> None:
        def write(self: CacheWriter, *args: Any) -> None:
            if args[-2] == victim:
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
            original(self, *args)

        monkeypatch.setattr(CacheWriter, "write_on_batch_end", write)
        ws.write(out)

    for number in itertools.count():
        out = f"killed-{number}"
        for _ in range(5):  # several kills of one cache, then to the end
            pid = in_child(partial(work, out, rng.randrange(12), rng.uniform(0, 0.03)))
            kills += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        ws.write(out)
        assert contents(str(ws.root / out)) == contents(whole)
        if kills >= 20:
            break


@pytest.mark.parametrize(
    ("call", "nth"), [("os.fsync", 5), ("pathlib.Path.rename", 3), ("pathlib.Path.rename", 4)]
)
def test_a_kill_between_shard_and_manifest_leaves_the_same_rows(
    ws: Workspace, whole: str, call: str, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly at each step of closing a shard: data flushed, shard renamed, manifest renamed."""
    module, _, name = call.rpartition(".")
    owner = os if module == "os" else Path
    original, left = getattr(owner, name), [nth]

    def dying(*args: object) -> object:
        left[0] -= 1
        return os._exit(9) if left[0] == 0 else original(*args)

    def work() -> None:
        monkeypatch.setattr(owner, name, dying)
        ws.write(out)

    out = f"{name}-{nth}"
    assert os.waitstatus_to_exitcode(os.waitpid(in_child(work), 0)[1]) == 9
    assert contents(str(ws.root / out)) != contents(whole)
    ws.write(out)
    assert contents(str(ws.root / out)) == contents(whole)


def test_a_complete_cache_is_left_as_it_is(ws: Workspace, whole: str) -> None:
    before = contents(whole)
    ws.write("whole")
    assert contents(whole) == before


@pytest.mark.parametrize(
    ("field", "changed"),
    [
        ("k", {"k": 5}),
        ("precision", {"precision": "compact"}),
        ("corpus", {"batch_size": 5}),
        ("corpus", {"supervise": "answer"}),
    ],
)
def test_another_cache_in_the_same_place_is_refused_by_field(
    ws: Workspace, whole: str, field: str, changed: dict[str, object]
) -> None:
    with pytest.raises(ConfigError, match=field):
        ws.write("whole", **changed)


def test_other_weights_are_refused(ws: Workspace, whole: str, tmp_path: Path) -> None:
    other = tmp_path / "model"
    small("llama", seed=5).save_pretrained(other)
    away = Path(ws.model)
    try:
        away.rename(tmp_path / "first")
        other.rename(away)
        for file in (tmp_path / "first").glob("token*"):
            (away / file.name).write_bytes(file.read_bytes())
        with pytest.raises(ConfigError, match="weights was"):
            ws.write("whole")
    finally:
        away.rename(other)
        (tmp_path / "first").rename(away)


def test_the_forecast_is_printed_first_and_near_the_truth(
    ws: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    ws.write("projected", count_seconds=600.0)
    said = capsys.readouterr().out.splitlines()
    before, after = [line for line in said if line.startswith("cache:")]
    cache = Cache(str(ws.root / "projected"))
    assert f"{cache.parts[0].positions:,} supervised" in before
    assert "complete" in after
    size = float(before.split("(")[1].split(" bytes")[0])
    assert abs(size / cache.parts[0].bytes_per_position - 1) < 0.25


@pytest.mark.parametrize(("quantize", "precision"), [("int8", "32-true"), (None, "bf16-mixed")])
def test_any_form_of_a_teacher_can_be_cached(
    ws: Workspace, tmp_path: Path, quantize: Quantization | None, precision: Any
) -> None:
    """What is stored is what that very form says, near to what the float32 teacher says, and is named."""
    out = str(tmp_path / "cache")
    Trainer(**BARE, precision=precision).predict(
        CacheTeacher(ws.model, out, quantize=quantize, count_seconds=0), datamodule=ws.corpus()
    )
    cache, plain = Cache(out), Cache(ws.write("float32"))
    assert (cache.about.quantize, cache.about.compute) == (quantize, precision)
    assert cache.corpus == plain.corpus
    own, other = (Rows.concatenate([c.read(i) for i in range(len(c.shards))]) for c in (cache, plain))
    gap = np.abs(own.entropy - other.entropy)
    assert 0 < gap.max() < 0.3
    assert (own.ids[:, 0] == other.ids[:, 0]).mean() > 0.9
