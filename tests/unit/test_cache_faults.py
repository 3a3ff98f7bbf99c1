"""Writing and reading a cache where something is wrong: one message, and nothing wrong is written or read."""

from __future__ import annotations

import copy
import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Trainer

from src.cache import Cache, CachedCorpus, CacheTeacher, CacheWriter, Manifest
from src.cache.shards import Rows
from src.data.loader import REPEATED
from src.errors import ConfigError
from src.losses.distill import Distillation
from src.teachers import CachedTeacher
from tests.cached import BARE, Workspace, small, tokenizer, workspace

torch.set_num_threads(1)


class Recovering:
    """What a teacher asks of a recovery."""

    def __init__(self, distillation: Distillation) -> None:
        self.distillation, self.head = distillation, SimpleNamespace(vocabulary=len(tokenizer()))
        self.data: object = None


@pytest.fixture(scope="module")
def cache(ws: Workspace) -> str:
    return ws.write("cache")


@pytest.mark.parametrize("precision", ["float16", "compact"])
def test_a_teacher_that_says_nan_is_refused_before_it_is_written(
    ws: Workspace, cache: str, tmp_path: Path, precision: str
) -> None:
    """As of one rare token, so that the check of the head at start-up does not see it."""
    model, seen = small("llama"), Cache(cache).read(0).tokens
    model.model.embed_tokens.weight.data[int(seen[seen > 12].min())] = torch.inf
    shutil.copytree(ws.model, tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    module = CacheTeacher(str(tmp_path / "model"), str(tmp_path / "out"), precision=precision)
    with pytest.raises(ConfigError, match="NaN or infinity"):
        Trainer(**BARE).predict(module, datamodule=ws.corpus())
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_a_model_that_mixes_packed_documents_is_refused(tmp_path: Path) -> None:
    ws = workspace(tmp_path, "opt", rows=16)
    ws.write("padded")
    with pytest.raises(ConfigError, match=r"data\.packing"):
        ws.write("packed", packing="documents", batch_size=2)


def test_a_cache_goes_on_in_the_precision_it_was_begun_in(ws: Workspace, cache: str, tmp_path: Path) -> None:
    def resume(path: Path, precision: str) -> None:
        Trainer(**BARE, precision=precision).predict(
            CacheTeacher(ws.model, str(path), shard_positions=700), datamodule=ws.corpus()
        )

    shutil.copytree(cache, tmp_path / "new")
    with pytest.raises(ConfigError, match="compute was 32-true and is now bf16-mixed"):
        resume(tmp_path / "new", "bf16-mixed")
    resume(tmp_path / "new", "32-true")
    shutil.copytree(cache, tmp_path / "old")
    manifest = Manifest.load(cache)
    assert manifest is not None
    replace(manifest, compute=None).save(str(tmp_path / "old"))
    resume(tmp_path / "old", "32-true")
    assert Cache(str(tmp_path / "old")).about.compute is None


def test_tokens_beyond_the_teachers_vocabulary_are_refused(ws: Workspace, tmp_path: Path) -> None:
    other = copy.deepcopy(tokenizer())
    other.add_tokens(["<new>"])
    other.save_pretrained(tmp_path / "tokenizer")
    corpus = ws.corpus()
    corpus.tokenizer = other
    with pytest.raises(ConfigError, match="vocabulary"):
        Trainer(**BARE).predict(CacheTeacher(ws.model, str(tmp_path / "out")), datamodule=corpus)


@pytest.mark.parametrize("out", ["s3://bucket/cache", "memory://cache"])
def test_a_url_is_refused_for_writing(out: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.out"):
        CacheTeacher("unused", out)


@pytest.mark.parametrize(
    "keys", [{"k": 0}, {"k": 2.5}, {"shard_positions": 0}, {"chunk_tokens": -1}, {"precision": "float64"}]
)
def test_faulty_settings_are_named(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(keys))):
        CacheTeacher("unused", "unused", **keys)


def test_a_directory_that_cannot_be_written_is_told_before_the_teacher_runs(
    ws: Workspace, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        ws.write(str(tmp_path / "file" / "cache"))


def test_a_full_disk_is_one_message_and_what_was_written_is_kept(
    ws: Workspace, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, original = [9], os.fsync

    def fsync(file: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(ConfigError, match="No space left"):
            ws.write("full")
    assert len(list((ws.root / "full").rglob("*.parquet"))) == 2
    ws.write("full")
    ours, theirs = Path(ws.root, "full", "part-0"), Path(cache, "part-0")
    assert {f.name: f.read_bytes() for f in ours.iterdir()} == {
        f.name: f.read_bytes() for f in theirs.iterdir()
    }


def test_on_several_ranks_only_what_is_marked_is_left_out_not_what_looks_alike(tmp_path: Path) -> None:
    row = Rows(
        np.arange(3, dtype=np.int32), np.ones(3, bool), np.array([3]), np.array([2]),
        np.zeros((2, 1), np.int32), *(np.zeros(s, np.float32) for s in ((2, 1), 2, 2)),
    )  # fmt: skip
    writer = CacheWriter(str(tmp_path))
    writer._rows, writer._known, writer._batches = [], [], 0
    trainer = type("Two", (), {"world_size": 2})()
    for batch in ({}, {}, {REPEATED: torch.ones(1)}):
        writer.write_on_batch_end(trainer, None, row, None, batch, 0, 0)
    assert len(writer._rows) == 2


def test_a_part_copied_over_another_is_refused(cache: str, tmp_path: Path) -> None:
    manifest = Manifest.load(cache)
    assert manifest is not None
    for part, shards in ((0, manifest.shards[:2]), (1, manifest.shards[2:])):
        folder = tmp_path / f"part-{part}"
        folder.mkdir()
        for shard in shards:
            shutil.copy(Path(cache, "part-0", shard.file), folder)
        replace(manifest, parts=2, part=part, shards=shards).save(str(tmp_path))
    assert sum(shard.rows for _, shard in Cache(str(tmp_path)).shards) == 48
    shutil.rmtree(tmp_path / "part-1")
    shutil.copytree(tmp_path / "part-0", tmp_path / "part-1")
    with pytest.raises(ConfigError, match="part-0, copied"):
        Cache(str(tmp_path))


@pytest.mark.parametrize("path", ["nowhere://bucket/cache", "gs://bucket/cache"])
def test_a_place_out_of_reach_is_no_damage(path: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Cache(path)


def test_what_the_loss_wants_is_compared_within_the_vocabulary(ws: Workspace) -> None:
    corpus = CachedCorpus(tokenizer=ws.model, train=ws.write("all", k=1000))
    corpus.fits(87, 100)
    corpus.fits(87, None)


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_a_faulty_batch_size_is_named(ws: Workspace, cache: str, size: Any) -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        CachedCorpus(tokenizer=ws.model, train=cache, batch_size=size)


def test_the_verb_test_finds_the_validation_cache(ws: Workspace, cache: str) -> None:
    corpus = CachedCorpus(tokenizer=ws.model, train=cache, validation=cache)
    assert len(list(corpus.test_dataloader())) == len(corpus.val_dataloader())


@pytest.mark.parametrize("keys", [{"k": 2.5}, {"chunk_tokens": 2.5}, {"mean_entropy": 0.0}])
def test_faulty_settings_of_the_loss_are_named(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(keys))):
        Distillation(**keys)


def test_a_coarse_cache_cannot_be_tempered(ws: Workspace) -> None:
    """The mass outside at another temperature would be off by half a nat."""
    module: Any = Recovering(Distillation(k=10, temperature=2.0))
    for precision, refused in (("float16", False), ("compact", True)):
        module.data = CachedCorpus(ws.model, ws.write(precision, precision=precision))
        if refused:
            with pytest.raises(ConfigError, match=r"precision: .* is compact"):
                CachedTeacher(any_teacher=True).setup(module)
            module.distillation = Distillation(k=10, temperature=2.0, rule="renormalise")
        CachedTeacher(any_teacher=True).setup(module)


def test_a_shard_that_is_gone_is_missed_before_training(ws: Workspace, cache: str, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "copy")
    last = sorted((tmp_path / "copy" / "part-0").glob("*.parquet"))[-1]
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=rf"{last.name}' has .* bytes"):
        CachedCorpus(ws.model, str(tmp_path / "copy"))
    last.unlink()
    with pytest.raises(ConfigError, match=rf"{last.name}' is missing"):
        CachedCorpus(ws.model, str(tmp_path / "copy"))
