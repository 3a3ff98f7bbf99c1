"""Two ranks write the cache that one process writes: every row once, killed in between or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.cache import Cache
from src.data.arithmetic import problems
from tests.distributed.launch import Bench

CONFIG = ["predict", "--config", "configs/cache/topk.yaml"]
pytestmark = pytest.mark.slow


def rows(path: Path) -> dict[tuple[int, ...], Any]:
    """The signal of each document, by its tokens; a document may be there once only."""
    cache, found = Cache(str(path)), dict[tuple[int, ...], Any]()
    for index in range(len(cache.shards)):
        part = cache.read(index)
        tokens, signals = np.cumsum(part.lengths), np.cumsum(part.counts)
        for row, (length, count) in enumerate(zip(part.lengths, part.counts, strict=True)):
            name = tuple(part.tokens[tokens[row] - length : tokens[row]].tolist())
            assert name not in found, "a document was written twice"
            found[name] = part.log_probs[signals[row] - count : signals[row]]
    return found


@pytest.mark.parametrize("overlay", ["ddp", "fsdp2"])
def test_two_ranks_write_what_one_writes(overlay: str, bench: Bench, tmp_path: Path) -> None:
    """43 documents on two ranks, 22 and 21; rank 1 is killed, and the same command resumes."""
    corpus = tmp_path / "odd.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in problems("train", 43, 0)))

    def write(name: str, by: str, ranks: int, callbacks: tuple[str, ...] = ()) -> Any:
        keys = {
            "data.init_args.train": corpus, "data.init_args.batch_size": 3,
            "model.init_args.model": bench.teacher, "model.init_args.out": tmp_path / name,
            "model.init_args.shard_positions": 200, "model.init_args.count_seconds": 0,
            "trainer.logger.init_args.save_dir": tmp_path / "log",
        }  # fmt: skip
        return bench.command(CONFIG, by, ranks, keys, callbacks)

    assert write("alone", "single", 1).returncode == 0
    death = f"tests.distributed.rows.Killed={{rank: 1, step: 5, note: {tmp_path / 'note'}}}"
    assert write("pair", overlay, 2, (death,)).returncode != 0
    assert list((tmp_path / "pair").rglob("*.parquet")), "something was written before"
    done = write("pair", overlay, 2)
    assert done.returncode == 0, done.stderr[-2000:]
    alone, pair = rows(tmp_path / "alone"), rows(tmp_path / "pair")
    assert len(alone) == 43
    assert alone.keys() == pair.keys()
    for name, signal in alone.items():
        np.testing.assert_allclose(signal.astype(float), pair[name].astype(float), rtol=0, atol=2e-3)


def test_equal_batches_are_all_written(bench: Bench, tmp_path: Path) -> None:
    """A document that is there more than once is no repetition of a rank that ran out."""
    first, *others = problems("train", 6, 0)
    corpus = tmp_path / "twice.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for other in others for row in (first, other)))
    keys = {
        "data.init_args.train": corpus, "data.init_args.batch_size": 1,
        "model.init_args.model": bench.teacher, "model.init_args.out": tmp_path / "pair",
        "model.init_args.count_seconds": 0, "trainer.logger.init_args.save_dir": tmp_path / "log",
    }  # fmt: skip
    done = bench.command(CONFIG, "ddp", 2, keys)
    assert done.returncode == 0, done.stderr[-2000:]
    cache = Cache(str(tmp_path / "pair"))
    assert sum(len(cache.read(index).lengths) for index in range(len(cache.shards))) == 10
