"""Reading a cache: nothing damaged or unfit is ever read as data."""

from __future__ import annotations

import copy
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from datasets import load_dataset
from lightning import LightningModule, Trainer

from src.cache import Cache, CachedCorpus, Manifest
from src.cache.shards import Rows, decode, encode
from src.errors import ConfigError
from src.losses.distill import Distillation
from src.losses.signals import topk_signal
from src.teachers import CachedTeacher
from tests.cached import BARE, Workspace, tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def cache(ws: Workspace) -> str:
    return ws.write("cache")


def damage(path: Path, rng: random.Random) -> str:
    """Do one random harm to a cache; what was done."""
    shards = sorted(path.rglob("*.parquet"))
    manifest = next(path.rglob("manifest.json"))
    file = rng.choice([*shards, manifest])
    data = bytearray(file.read_bytes())
    kind = rng.choice(["flip", "truncate", "swap", "edit"])
    if kind == "flip":
        at = rng.randrange(len(data))
        data[at] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        return f"flip {file.name} byte {at}"
    if kind == "truncate":
        size = rng.randrange(len(data))
        file.write_bytes(data[:size])
        return f"truncate {file.name} to {size}"
    if kind == "swap":
        a, b = rng.sample(shards, 2)
        one, other = a.read_bytes(), b.read_bytes()
        a.write_bytes(other)
        b.write_bytes(one)
        return f"swap {a.name} {b.name}"
    content = json.loads(manifest.read_text())
    target = rng.choice([content, *content["shards"]])
    key = rng.choice([key for key in target if key not in ("shards", "digest")])
    target[key] = rng.choice([7, "x", None, True])
    manifest.write_text(json.dumps(content, indent=2) + "\n")
    return f"edit {key}"


def test_two_hundred_random_faults_are_all_detected(ws: Workspace, cache: str, tmp_path: Path) -> None:
    rng, seen, original = random.Random(0), set[str](), Path(cache)
    for number in range(200):
        bad = tmp_path / str(number)
        shutil.copytree(original, bad)
        done = damage(bad, rng)
        seen.add(done.split()[0])
        files = [f.relative_to(bad) for f in bad.rglob("*.*")]
        changed = any((bad / f).read_bytes() != (original / f).read_bytes() for f in files)
        try:
            read = Cache(str(bad))
            for i in range(len(read.shards)):
                read.read(i)
        except ConfigError:
            assert changed
        else:
            assert not changed, f"not detected: {done}"
        shutil.rmtree(bad)
    assert seen == {"flip", "truncate", "swap", "edit"}


def test_an_undamaged_copy_is_read(cache: str, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "copy")
    twin = Cache(str(tmp_path / "copy"))
    assert twin.corpus == Cache(cache).corpus
    assert len(twin.read(0).tokens) > 0


def test_a_missing_shard_an_incomplete_and_an_absent_cache_are_named(cache: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is none"):
        Cache(str(tmp_path / "nowhere"))
    twin = tmp_path / "copy"
    shutil.copytree(cache, twin)
    (twin / "part-0" / "00001.parquet").unlink()
    with pytest.raises(ConfigError, match=r"00001\.parquet"):
        Cache(str(twin)).read(1)
    manifest = Manifest.load(cache)
    assert manifest is not None
    replace(manifest, complete=False).save(str(tmp_path / "half"))
    with pytest.raises(ConfigError, match="incomplete"):
        Cache(str(tmp_path / "half"))


@pytest.mark.parametrize(("field", "vocabulary", "k"), [("k", 88, 11), ("k", 87, 11), ("k", 87, None)])
def test_what_does_not_fit_the_loss_is_named(
    ws: Workspace, cache: str, field: str, vocabulary: int, k: int | None
) -> None:
    corpus = CachedCorpus(tokenizer=ws.model, train=cache)
    for padded in (87, 88, 128):
        corpus.fits(padded, 10)  # heads padded to other widths share the vocabulary
    with pytest.raises(ConfigError, match=f"cache: {field}"):
        corpus.fits(vocabulary, k)


def test_another_tokenizer_or_corpus_is_named(ws: Workspace, cache: str, tmp_path: Path) -> None:
    other = copy.deepcopy(tokenizer())
    other.add_tokens(["<new>"])
    other.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="tokenizer"):
        CachedCorpus(tokenizer=str(tmp_path), train=cache)
    with pytest.raises(ConfigError, match="corpus"):
        CachedCorpus(tokenizer=ws.model, train=cache, corpus="0123456789abcdef")
    CachedCorpus(tokenizer=ws.model, train=cache, corpus=Cache(cache).corpus)


def test_the_library_reads_the_same_rows(cache: str) -> None:
    ours = Cache(cache).read(0)
    theirs = load_dataset("parquet", data_files=f"{cache}/part-0/*.parquet", split="train", streaming=True)
    first = next(iter(theirs))
    assert first["input_ids"] == ours.tokens[: ours.lengths[0]].tolist()
    assert first["teacher_ids"] == ours.ids[: ours.counts[0]].flatten().tolist()
    np.testing.assert_allclose(first["teacher_entropy"], ours.entropy[: ours.counts[0]])


def test_a_cache_elsewhere_is_read_and_checked_like_a_local_one(cache: str) -> None:
    """Any fsspec file system: a bucket, the Hub, or as here memory."""
    remote = fsspec.filesystem("memory")
    remote.put(cache, "/bucket/cache", recursive=True)
    there, here = Cache("memory://bucket/cache"), Cache(cache)
    np.testing.assert_array_equal(there.read(1).tokens, here.read(1).tokens)
    remote.pipe("/bucket/cache/part-0/00001.parquet", b"PAR1")
    with pytest.raises(ConfigError, match=r"00001\.parquet.*damaged"):
        there.read(1)


@pytest.mark.parametrize(
    ("precision", "error"), [("float32", 0.0), ("float16", 2**-11), ("compact", 1.01 / 57)]
)
def test_rows_come_back_within_the_stated_precision(precision: str, error: float) -> None:
    """Relative error for floats; half a step of the code, ``sqrt(-log p) / 57``, for ``compact``."""
    signal = topk_signal(5 * torch.randn(40, 200, generator=torch.Generator().manual_seed(0)), 10)
    rows = Rows(
        np.arange(44, dtype=np.int32), np.ones(44, bool), np.array([30, 14]), np.array([28, 12]),
        signal.ids.int().numpy(), *(x.numpy() for x in (signal.log_probs, signal.entropy, signal.log_rest)),
    )  # fmt: skip
    back = decode(encode(rows, precision), 10)
    for name in ("tokens", "supervised", "lengths", "counts", "ids"):
        np.testing.assert_array_equal(getattr(back, name), getattr(rows, name))
    bound = np.sqrt(-rows.log_probs) * error if precision == "compact" else -rows.log_probs * error
    assert (np.abs(back.log_probs - rows.log_probs) <= bound + 1e-4 * (error > 0)).all()
    np.testing.assert_allclose(back.entropy, rows.entropy, rtol=min(error, 2**-11))
    np.testing.assert_allclose(back.log_rest, rows.log_rest, rtol=min(error, 2**-11))


# ------------------------------------------------------------------ batches


def tokens_of(loader: object) -> list[list[int]]:
    return [
        ids[mask == 1].tolist()
        for batch in loader
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def test_an_epoch_has_every_document_once_in_an_order_of_its_own(ws: Workspace, cache: str) -> None:
    loader = CachedCorpus(tokenizer=ws.model, train=cache, batch_size=5).train_dataloader()
    first, second = tokens_of(loader), tokens_of(loader)
    assert first != second
    assert sorted(first) == sorted(second)
    assert len(first) == 48
    assert first == tokens_of(CachedCorpus(tokenizer=ws.model, train=cache, batch_size=5).train_dataloader())


def test_ranks_share_the_batches_and_have_equally_many(ws: Workspace, cache: str) -> None:
    corpus = CachedCorpus(tokenizer=ws.model, train=cache, batch_size=4)
    loaders = [corpus.train_dataloader() for _ in range(3)]
    for rank, loader in enumerate(loaders):
        loader.rank, loader.world = rank, 3
    batches = [list(loader) for loader in loaders]
    assert {len(b) for b in batches} == {len(loaders[0])}
    union = {tuple(row) for b in batches for row in tokens_of(b)}
    assert union == {tuple(row) for row in tokens_of(corpus.train_dataloader())}


class Recorder(LightningModule):
    """Trains nothing, remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[int]] = []

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        self.seen.append(batch["input_ids"][0].tolist())
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("stop", [3, 12, 16])
def test_training_resumes_at_the_next_batch(ws: Workspace, cache: str, tmp_path: Path, stop: int) -> None:
    """In the middle of an epoch, at its end (12 batches), and in the second."""

    def fit(steps: int, checkpoint: Path | None = None) -> tuple[list[list[int]], Trainer]:
        module, trainer = Recorder(), Trainer(max_steps=steps, **BARE)
        corpus = CachedCorpus(tokenizer=ws.model, train=cache, batch_size=5)
        assert len(corpus.train_dataloader()) == 12
        trainer.fit(module, datamodule=corpus, ckpt_path=checkpoint, weights_only=False)
        return module.seen, trainer

    whole, _ = fit(20)
    before, trainer = fit(stop)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    after, _ = fit(20, tmp_path / "x.ckpt")
    assert before + after == whole


def test_the_place_in_another_cache_is_refused(ws: Workspace, cache: str) -> None:
    loader = CachedCorpus(tokenizer=ws.model, train=cache).train_dataloader()
    next(iter(loader))
    other = CachedCorpus(tokenizer=ws.model, train=ws.write("other", supervise="answer")).train_dataloader()
    with pytest.raises(ConfigError, match="corpus"):
        other.load_state_dict(loader.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [({"batch_size": 5}, "batch_size was 4 and is now 5"), ({"seed": 1}, "seed was 0 and is now 1")],
)
def test_the_place_in_another_order_is_refused(
    ws: Workspace, cache: str, change: dict[str, int], message: str
) -> None:
    loader = CachedCorpus(tokenizer=ws.model, train=cache, batch_size=4).train_dataloader()
    next(iter(loader))
    keys = {"batch_size": 4, **change}
    other = CachedCorpus(tokenizer=ws.model, train=cache, **keys).train_dataloader()
    with pytest.raises(ConfigError, match=message):
        other.load_state_dict(loader.state_dict())


def test_cached_teacher_wants_a_cached_corpus_and_gives_its_signal(ws: Workspace, cache: str) -> None:
    module = Recorder()
    module.distillation = Distillation(k=4)
    module.head = type("Head", (), {"vocabulary": 87})()
    module.data = None
    teacher = CachedTeacher(any_teacher=True)
    with pytest.raises(ConfigError, match="CachedCorpus"):
        teacher.setup(module)
    module.data = CachedCorpus(tokenizer=ws.model, train=cache)
    teacher.setup(module)
    batch = next(iter(module.data.train_dataloader()))
    signal = teacher.signal(batch, torch.arange(len(batch["teacher_ids"])))
    assert signal.ids.shape[1] == 4
    mass = signal.log_probs.exp().sum(-1) + signal.log_rest.exp()
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=3e-3)
