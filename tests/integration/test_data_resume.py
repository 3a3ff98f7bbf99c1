"""Resume: kill a run anywhere, and it goes on at the very next row, as if nothing had happened."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from src.data import Corpus, row_ids
from src.data.loader import Loader
from src.errors import ConfigError
from src.training.schedules import with_warmup
from tests.data_tools import corpus, numbered, write_rows
from tests.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")


class Recorder(LightningModule):
    """Trains one number and writes down the rows of every step."""

    def __init__(self, log: Path, pause: float = 0.0) -> None:
        super().__init__()
        self.weight, self.log_path, self.pause = torch.nn.Parameter(torch.zeros(())), log, pause

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        with open(f"{self.log_path}.{self.global_rank}", "a") as file:
            file.write(json.dumps([self.global_step, row_ids(batch)]) + "\n")
        time.sleep(self.pause)
        return self.weight * batch["labels"].float().mean()

    def validation_step(self, batch: dict[str, torch.Tensor], _: int) -> None:
        assert batch["input_ids"].numel()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-9)


def trainer(folder: Path, **options: Any) -> Trainer:
    keys = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "max_epochs": -1}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return Trainer(default_root_dir=folder, **{**keys, **quiet, **options})


def rows(log: Path, rank: int = 0) -> dict[int, list[int]]:
    """The rows of each step; a step that was taken twice had the same rows."""
    steps: dict[int, list[int]] = {}
    for line in Path(f"{log}.{rank}").read_text().splitlines():
        step, ids = json.loads(line)
        assert steps.setdefault(step, ids) == ids, f"step {step} was repeated with other rows"
    return steps


def take(loader: Loader, count: int) -> list[list[list[int]]]:
    """Hand over ``count`` batches, over epochs, while one more is always fetched ahead."""
    found: list[list[list[int]]] = []
    while len(found) < count:
        batches = iter(loader)
        ahead = next(batches, None)
        while ahead is not None and len(found) < count:
            batch, ahead = ahead, next(batches, None)
            loader.handed()
            found.append(batch["input_ids"].tolist())
    return found


@pytest.mark.parametrize("packing", ["padded", "documents"])
def test_ten_kills_of_two_ranks_with_two_workers(tmp_path, packing):
    path = write_rows(tmp_path / "a.jsonl", numbered(150))
    rng, total = random.Random(0), 45
    cuts = [0, *sorted(rng.sample(range(1, total), 10)), total]
    for rank in range(2):

        def loader(rank: int = rank, **options: Any) -> Loader:
            data = corpus(tmp_path, path, packing=packing, batch_size=4)
            return data.loader("train", shuffle=True, rank=rank, world=2, **options)

        whole = take(loader(), total)
        parts, position = [], None
        for begin, end in itertools.pairwise(cuts):
            part = loader(workers=2, position=position)
            parts += take(part, end - begin)
            position = json.loads(json.dumps(part.position))  # all that outlives the kill
        assert parts == whole
        assert position["epoch"] >= 1


@pytest.fixture
def small(tmp_path: Path) -> str:
    """21 rows: an epoch of 8 batches of at most 4 rows on one rank."""
    return write_rows(tmp_path / "a.jsonl", numbered(21))


@pytest.mark.parametrize(
    ("cut", "before", "after"), [(1, 0, 2), (5, 1, 0), (8, 2, 1), (9, 0, 2), (16, 1, 0), (19, 2, 1)]
)
def test_lightning_resumes_at_the_next_row_on_any_workers(tmp_path, small, cut, before, after):
    """In mid-epoch and at its ends; 8 batches make an epoch."""

    def fit(name: str, steps: int, workers: int, start: str | None = None) -> Corpus:
        data = corpus(tmp_path, small, validation=small, num_workers=workers)
        run = trainer(tmp_path, max_steps=steps, val_check_interval=3, check_val_every_n_epoch=None)
        run.fit(Recorder(tmp_path / name), datamodule=data, ckpt_path=start)
        run.save_checkpoint(tmp_path / f"{name}.ckpt")
        return data

    whole = fit("whole", 20, 0)
    fit("parts", cut, before)
    resumed = fit("parts", 20, after, str(tmp_path / "parts.ckpt"))
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert resumed.statistics == whole.statistics
    assert resumed.tokens_seen == whole.tokens_seen


def train_until_killed(folder: Path, path: str) -> None:
    """Train to step 60 on 2 ranks of 2 workers, going on from the last checkpoint there is."""
    os.setsid()  # so that one signal ends ranks and workers too
    last = folder / "last.ckpt"
    save = ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_last=True, save_top_k=0)
    keys = {"strategy": "ddp_fork", "devices": 2, "enable_checkpointing": True, "callbacks": [save]}
    run = trainer(folder, max_steps=60, **keys)
    data = corpus(folder, path, num_workers=2)
    run.fit(Recorder(folder / "log", 0.05), datamodule=data, ckpt_path=str(last) if last.exists() else None)
    os._exit(0)


def steps_taken(log: Path) -> int:
    file = Path(f"{log}.0")
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.mark.slow
def test_sigkill_of_two_ranks_of_two_workers_at_random_steps(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", numbered(150))
    corpus(tmp_path, path)  # writes the tokenizer, for all of them
    context, rng = multiprocessing.get_context("fork"), random.Random(0)
    for kill in range(11):
        process = context.Process(target=train_until_killed, args=(tmp_path, path))
        process.start()
        assert process.pid is not None
        until = steps_taken(tmp_path / "log") + rng.randint(1, 5)
        while kill < 10 and steps_taken(tmp_path / "log") < until:
            assert process.is_alive()
            time.sleep(0.02)
        if kill < 10:
            time.sleep(0.1 * rng.random())
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == (-signal.SIGKILL if kill < 10 else 0)
    data = corpus(tmp_path, path)
    run = trainer(tmp_path, max_steps=60, strategy="ddp_fork", devices=2)
    run.fit(Recorder(tmp_path / "whole"), datamodule=data)
    for rank in range(2):
        assert rows(tmp_path / "log", rank) == rows(tmp_path / "whole", rank)


def test_two_ranks_of_lightning_stay_in_step_and_resume(tmp_path, small):
    """21 rows on two ranks: 11 and 10; the short rank repeats a batch, and nobody waits for ever."""

    def fit(name: str, steps: int, start: str | None = None) -> None:
        data = corpus(tmp_path, small, batch_size=1)
        run = trainer(tmp_path, max_steps=steps, strategy="ddp_fork", devices=2)
        run.fit(Recorder(tmp_path / name), datamodule=data, ckpt_path=start)
        run.save_checkpoint(tmp_path / f"{name}.ckpt")

    fit("whole", 26)
    fit("parts", 15)
    fit("parts", 26, str(tmp_path / "parts.ckpt"))
    epoch: list[int] = []
    for rank in range(2):
        whole = rows(tmp_path / "whole", rank)
        assert len(whole) == 26
        assert rows(tmp_path / "parts", rank) == whole
        epoch += [row for step in range(11) for row in whole[step]]
    assert len(epoch) == 22
    assert len(set(epoch)) == 21


def test_a_changed_corpus_is_refused_at_resume(tmp_path, small):
    run, path = trainer(tmp_path, max_steps=2), str(tmp_path / "a.ckpt")
    run.fit(Recorder(tmp_path / "log"), datamodule=corpus(tmp_path, small))
    run.save_checkpoint(path)
    for changes, message in [
        ({"seed": 1}, r"data\.init_args\.seed was 0 and is now 1"),
        ({"batch_size": 2, "eos": False}, r"batch_size was 4 and is now 2; data\.init_args\.eos was True"),
    ]:
        with pytest.raises(ConfigError, match=message):
            trainer(tmp_path, max_steps=4).fit(
                Recorder(tmp_path / "log"), datamodule=corpus(tmp_path, small, **changes), ckpt_path=path
            )
    # validation has no place in the corpus to lose
    data = corpus(tmp_path, small, validation=small, batch_size=2)
    trainer(tmp_path).validate(Recorder(tmp_path / "log"), datamodule=data, ckpt_path=path, verbose=False)


@pytest.mark.parametrize(("key", "value"), [("name", "other"), ("format", "lines")])
def test_another_part_or_reading_of_the_same_path_is_refused_at_resume(tmp_path, small, key, value):
    """The path alone does not say what is read: a place in one configuration means nothing in another."""
    before = corpus(tmp_path, [{"path": small}])
    next(iter(before.train_dataloader()))
    saved = before.state_dict()
    moved = write_rows(tmp_path / "tokenizer" / "a.jsonl", numbered(21))
    corpus(tmp_path, [{"path": moved}]).load_state_dict(saved)
    with pytest.raises(ConfigError, match=rf"data\.init_args\.train was .*'{key}': .* '{key}': '{value}'"):
        corpus(tmp_path, [{"path": small, key: value}]).load_state_dict(saved)


def test_a_token_limit_stops_the_trainer(tmp_path, small):
    data = corpus(tmp_path, small, max_tokens="1K")
    run = trainer(tmp_path)
    run.fit(Recorder(tmp_path / "log"), datamodule=data)
    run.save_checkpoint(tmp_path / "end.ckpt")
    assert 1000 <= data.tokens_seen < 1000 + 4 * 64
    assert run.current_epoch >= 1
    again = corpus(tmp_path, small, max_tokens="1K")
    more = trainer(tmp_path)
    more.fit(Recorder(tmp_path / "more"), datamodule=again, ckpt_path=str(tmp_path / "end.ckpt"))
    assert not Path(tmp_path / "more.0").exists()


class Scheduled(Recorder):
    """A recorder whose learning rate follows the schedule of a recovery."""

    def on_train_batch_start(self, *_: Any) -> None:
        self.rates.append(self.optimizers().param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        self.rates: list[float] = []
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        return with_warmup(optimizer, self.trainer, 0.2, 0.1, "linear")


def test_a_token_limit_alone_ends_the_schedule_too(tmp_path, small):
    """Without max_steps the learning rate falls to its end over the tokens, and goes on there at a resume."""

    def fit(name: str, start: str | None = None) -> list[float]:
        save = ModelCheckpoint(tmp_path, name + "{step}", every_n_train_steps=5, save_top_k=-1)
        run, module = (
            trainer(tmp_path, enable_checkpointing=True, callbacks=[save]),
            Scheduled(tmp_path / name),
        )
        run.fit(module, datamodule=corpus(tmp_path, small, max_tokens="2K"), ckpt_path=start)
        return module.rates

    whole = fit("whole")
    assert whole[0] == 0
    assert max(whole) > 0.9
    assert 0.1 < whole[-1] < 0.2
    assert whole[:10] + fit("rest", str(tmp_path / "wholestep=10.ckpt")) == whole


class Student(Recorder):
    """A recorder that holds a model."""

    def __init__(self, log: Path, family: str) -> None:
        super().__init__(log)
        self.model = tiny_model(family)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.model(batch["input_ids"]).logits


def test_packing_under_a_model_that_mixes_documents_is_refused(tmp_path, small):
    for family in ("llama", "mamba"):
        data = corpus(tmp_path, small, packing="documents", validation=small)
        student, run = Student(tmp_path / family, family), trainer(tmp_path, max_steps=2)
        if family == "llama":
            run.fit(student, datamodule=data)
        else:
            for verb in (run.fit, run.validate, run.predict):
                with pytest.raises(ConfigError, match="does not keep the documents of a packed row apart"):
                    verb(student, datamodule=data)
