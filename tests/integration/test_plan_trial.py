"""A trial of a plan: hours are those of the steps that were run, and nothing of the trial is left."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from src.cli import run
from src.errors import ConfigError
from src.mask import Mask
from src.plan import trial, verb
from src.plan.devices import Tried, device
from src.plan.experiment import Experiment
from src.plan.memory import OVERHEAD
from src.plan.planner import Planner
from src.plan.trial import Enough, Marks
from tests.planning import CACHE, PLENTY, RECOVER, SEARCH, planner_of


@pytest.fixture
def asked(teacher_dir: str, corpus_file: str, tmp_path: Path) -> dict[str, list[str]]:
    """Arguments of each stage on the tiny teacher."""
    Mask.by_hand(teacher_dir, 6, (0, 1, 2, 5)).save(tmp_path / "mask.json")
    own = {
        SEARCH: {"model.init_args.model": teacher_dir, "model.init_args.draws": 1},
        RECOVER: {"model.init_args.mask": tmp_path / "mask.json"},
        CACHE: {"model.init_args.model": teacher_dir, "model.init_args.out": tmp_path / "cache"},
    }
    rows = {
        "data.init_args.tokenizer": teacher_dir, "data.init_args.train": corpus_file,
        "data.init_args.batch_size": 2, "data.init_args.max_length": 64, "trainer.accelerator": "cpu",
    }  # fmt: skip
    held = {"data.init_args.validation": corpus_file}
    found = {}
    for config, keys in own.items():
        every = {**rows, **({} if config == CACHE else held), **keys}
        found[config] = ["--config", config, *(f"--{key}={value}" for key, value in every.items())]
    return found


@pytest.mark.parametrize("config", [SEARCH, RECOVER, CACHE])
def test_steps_are_timed_and_nothing_is_left(
    asked: dict[str, list[str]],
    config: str,
    teacher_dir: str,
    corpus_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No log, mask, checkpoint or cache; the hours are the steps times the seconds of one."""
    argv = [part.replace("configs/", f"{Path('configs').resolve()}/", 1) for part in asked[config]]
    (at := tmp_path / "here").mkdir()
    monkeypatch.chdir(at)
    more = ["--tokens", "100k"] if config == CACHE else []
    if config == RECOVER:  # without validation, with callbacks that write where they are told
        record = f"{{class_path: src.callbacks.StageRecord, init_args: {{path: {at / 'mine.json'}}}}}"
        saves = f"{{dirpath: {at / 'ck'}, every_n_train_steps: 1}}"
        saver = f"{{class_path: src.callbacks.LastCheckpoint, init_args: {saves}}}"
        more += [f"--trainer.callbacks=[{record}, {saver}]", "--trainer.limit_val_batches=0"]
    seen = list[Tried]()
    timed = trial.tried
    monkeypatch.setattr(verb, "tried", lambda *args: seen.append(timed(*args)) or seen[0])
    run(["plan", *argv, *more, "--trial", "2", "--json", str(tmp_path / "plan.json")])
    assert [*at.iterdir()] == []
    assert not (tmp_path / "cache").exists()
    told = json.loads((tmp_path / "plan.json").read_text())
    assert told["trial"] == 2
    assert told["device"]["efficiency"] != device("cpu").efficiency
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    rows = [json.loads(line) for line in Path(corpus_file).read_text().splitlines()]
    ids = tokenizer([f"{row['question']}\n{row['answer']}{tokenizer.eos_token}" for row in rows]).input_ids
    mean = 2 * sum(min(64, len(row)) for row in ids) / len(ids)
    assert seen[0].tokens == pytest.approx(mean, rel=0.05), "two rows, as long as they are on average"
    if config == CACHE:  # the tokens end it
        assert told["steps"] == math.ceil(100_000 / seen[0].tokens)
    assert told["tokens"] == (100_000 if config == CACHE else int(told["steps"] * seen[0].tokens))
    steps_alone = told["steps"] * seen[0].seconds / 3600
    assert seen[0].seconds > 0
    tensors = sum(size for part, size in told["configured"]["parts"].items() if part != OVERHEAD)
    holes = int(device("cpu").fragmentation * tensors)
    assert seen[0].memory < told["configured"]["total"] <= seen[0].memory + holes
    assert seen[0].memory > 100 * 2**20, "the process, with its libraries"
    if config == SEARCH:  # the polish comes on top, at the same speed
        assert told["configured"]["hours"] > steps_alone
    else:
        assert told["configured"]["hours"] == pytest.approx(steps_alone)


def test_a_trial_scales_hours_and_tells_the_overhead(tmp_path: Path) -> None:
    planner = planner_of(tmp_path, SEARCH)
    before = planner.configured
    planner.tried(Tried(2.0, 0))
    slow = planner.configured
    tensors = {part: count for part, count in before.parts.items() if part != OVERHEAD}
    planner.tried(Tried(1.0, sum(tensors.values()) + 1000))
    fast = planner.configured
    assert slow.hours == pytest.approx(2 * fast.hours)
    assert slow.flops == fast.flops == before.flops
    holes = int(PLENTY.fragmentation * sum(tensors.values()))
    assert slow.parts == {**tensors, OVERHEAD: holes}, "less than what is counted: shorter rows"
    assert fast.parts == {**tensors, OVERHEAD: holes + 1000}
    assert planner.device.tflops == PLENTY.tflops, "the peak stays what it is"
    planner.device = replace(planner.device, overhead=7)
    planner.tried(Tried(1.0, sum(tensors.values()) + 1000))
    assert planner.configured.parts[OVERHEAD] == holes + 1007, "of a GPU a trial tells the tensors alone"


def test_where_tokens_end_the_run_shorter_steps_are_more(tmp_path: Path) -> None:
    planner = planner_of(tmp_path, CACHE)
    tokens, steps, rows = planner.tokens, planner.steps, planner.experiment.rows
    planner.tried(Tried(2.0, 0, rows.count * rows.length / 4))
    assert planner.tokens == tokens
    assert 4 * (steps - 1) < planner.steps <= 4 * steps
    assert planner.configured.hours == pytest.approx(planner.steps * 2.0 / 3600)


@pytest.mark.parametrize("config", [SEARCH, RECOVER, CACHE])
def test_the_steps_that_fit_are_the_most_that_take_no_longer(config: str, tmp_path: Path) -> None:
    planner = planner_of(tmp_path, config)
    hours = planner.configured.hours
    assert planner.within(hours * (1 + 1e-9)) == planner.steps
    assert planner.within(hours * (1 - 1e-9)) == planner.steps - 1
    assert planner.within(1e-30) == 0


def test_seconds_are_those_of_a_step_of_the_usual_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps after a first, of two batches each: 60 and 20 tokens. The corpus has 12 in a batch."""
    clock = iter([10.0, 16.0, 20.0])
    monkeypatch.setattr(trial.time, "perf_counter", lambda: next(clock))
    marks = Marks(2)

    class Running:
        global_step, device, accumulate_grad_batches = 0, torch.device("cpu"), 2
        train_dataloader = (batch(1, 6), batch(3, 6))

    def steps() -> None:
        for at, length in enumerate((100, 1, 30, 30, 5, 15), 1):
            Running.global_step = at // 2
            marks.on_train_batch_end(Running, Running, None, batch(1, length), at)  # type: ignore[arg-type]

    with pytest.raises(Enough) as enough:
        steps()
    assert enough.value.tried.seconds == pytest.approx(24 * (6 / 60 + 4 / 20) / 2)
    assert enough.value.tried.tokens == 2 * (1 + 6) / 2, "of a lower triangle"


def batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.zeros(rows, length, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids).tril()}


def test_what_cannot_be_tried_is_refused(asked: dict[str, list[str]]) -> None:
    with pytest.raises(ConfigError, match="--device h100 x 1 given"):
        run(["plan", *asked[RECOVER], "--trial", "2", "--device", "h100"])
    with pytest.raises(ConfigError, match="--device cpu x 2 given"):
        run(["plan", *asked[RECOVER], "--trial", "2", "--devices", "2"])
    with pytest.raises(ConfigError, match="--trial: 2 given; accepted: less than the run's steps, 2"):
        run(["plan", *asked[RECOVER], "--trainer.max_steps", "2", "--trial", "2"])
    with pytest.raises(ConfigError, match="leave out --ratio and --length"):
        run(["plan", *asked[RECOVER], "--ratio", "0.5", "--trial", "2"])
    with pytest.raises(ConfigError, match="leave out --ratio and --length"):
        run(["plan", *asked[RECOVER], "--length", "32", "--trial", "2"])
    assert Planner(Experiment(asked[RECOVER]), PLENTY).device is PLENTY


def test_distinct_tokens_are_planned_where_the_data_say_how_many_rows_are_read(
    asked: dict[str, list[str]], corpus_file: str
) -> None:
    """Eight rows of 64 tokens, however often they are read; and never more than are processed."""
    rows = f"[{{path: {corpus_file}, rows: 5}}, {{path: {corpus_file}, rows: 3}}]"
    told = [*asked[RECOVER], f"--data.init_args.train={rows}"]
    assert Experiment(told).distinct(10_000) == 8 * 64
    assert Experiment(told).distinct(100) == 100
    assert Experiment(asked[RECOVER]).distinct(10_000) is None
    assert Experiment([*told, "--data.init_args.too_long=split"]).distinct(10_000) is None
    assert Experiment([*told, f"--data.init_args.train=[{corpus_file}]"]).distinct(10_000) is None


@pytest.mark.parametrize(("rows", "batches"), [(1, 256), (8, 256), (32, 64), (4096, 1)])
def test_as_many_rows_are_counted_whatever_a_batch_holds(rows: int, batches: int) -> None:
    """Rows differ in length; batches of few rows are cut off, for one may hold a long text."""
    left = iter([batch(rows, 2)] * 300)

    class Running:
        global_step, device, accumulate_grad_batches, train_dataloader = 1, torch.device("cpu"), 1, left

    marks = Marks(1)
    marks.on_train_batch_end(Running, Running, None, batch(rows, 2), 1)  # type: ignore[arg-type]
    Running.global_step = 2
    with pytest.raises(Enough):
        marks.on_train_batch_end(Running, Running, None, batch(rows, 2), 2)  # type: ignore[arg-type]
    assert 300 - len([*left]) == batches
