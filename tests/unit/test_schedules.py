"""Schedules: ends, monotony, and the callbacks that follow them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from src.callbacks import PruningCurriculum, TemperatureAnnealing
from src.errors import ConfigError
from src.training.schedules import interpolate, total_steps, warmup_decay


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_warmup_rises_to_one_and_decay_falls_to_final(shape: str) -> None:
    values = [warmup_decay(i / 100, 0.1, 0.02, shape) for i in range(101)]  # type: ignore[arg-type]
    assert values[0] == 0
    assert values[10] == pytest.approx(1)
    assert values[100] == pytest.approx(0.02)
    assert values[:11] == sorted(values[:11])
    assert values[10:] == sorted(values[10:], reverse=True)


def test_constant_stays() -> None:
    assert warmup_decay(0.7, 0.1, 0.0, "constant") == 1


def test_interpolation_hits_both_ends() -> None:
    for shape in ("linear", "exponential"):
        assert interpolate(0, 4, 0.1, shape) == pytest.approx(4)  # type: ignore[arg-type]
        assert interpolate(1, 4, 0.1, shape) == pytest.approx(0.1)  # type: ignore[arg-type]
    assert interpolate(0.5, 4, 1, "exponential") == pytest.approx(2)


class Run:
    """The part of a trainer and a module that a schedule touches."""

    def __init__(self, steps: int, target: int) -> None:
        self.trainer = SimpleNamespace(global_step=0, estimated_stepping_batches=steps, datamodule=None)
        self.policy = SimpleNamespace(temperature=None, target=target, remove=None)
        self.module = SimpleNamespace(policy=self.policy, log=lambda *_: None)

    def course(self, callback: object, field: str) -> list[float]:
        values = []
        for step in range(self.trainer.estimated_stepping_batches):
            self.trainer.global_step = step
            callback.on_train_batch_start(self.trainer, self.module)  # type: ignore[attr-defined]
            values.append(getattr(self.policy, field))
        return values


def test_temperature_goes_from_start_to_end() -> None:
    course = Run(20, 4).course(TemperatureAnnealing(4.0, 0.1), "temperature")
    assert course[0] == pytest.approx(4)
    assert course[-1] == pytest.approx(0.1)
    assert course == sorted(course, reverse=True)


@pytest.mark.parametrize("until", [0.25, 0.5, 1.0])
def test_curriculum_rises_in_whole_layers_and_arrives(until: float) -> None:
    course = Run(40, 5).course(PruningCurriculum(until), "remove")
    assert course == sorted(course)
    assert course[0] == max(1, math.ceil(5 / (until * 40)))
    assert course[math.ceil(until * 40) - 1] == 5
    assert course[-1] == 5


def test_curriculum_can_be_switched_off() -> None:
    assert set(Run(8, 3).course(PruningCurriculum(0), "remove")) == {3}


@pytest.mark.parametrize("steps", [-1, 1000])
def test_schedules_arrive_where_the_tokens_end(steps: int) -> None:
    """A run that ``max_tokens`` ends has no known steps, or more than it takes; 10 tokens a step here."""
    run = Run(20, 4)
    temperatures, removed = [], []
    for step in range(20):
        run.trainer.global_step, run.trainer.estimated_stepping_batches = step, steps
        run.trainer.datamodule = SimpleNamespace(max_tokens=200, tokens_seen=10 * (step + 1))
        for callback, found, field in (
            (TemperatureAnnealing(4.0, 0.1), temperatures, "temperature"),
            (PruningCurriculum(0.5), removed, "remove"),
        ):
            callback.on_train_batch_start(run.trainer, run.module)
            found.append(getattr(run.policy, field))
    assert temperatures == sorted(temperatures, reverse=True)
    assert temperatures[-1] == pytest.approx(0.1)
    assert removed[9:] == [4] * 11
    assert removed[0] == 1


def test_a_run_without_an_end_is_refused() -> None:
    trainer = SimpleNamespace(estimated_stepping_batches=-1, datamodule=SimpleNamespace(max_tokens=None))
    with pytest.raises(ConfigError, match=r"trainer\.max_steps: .*or data\.max_tokens"):
        total_steps(trainer)  # type: ignore[arg-type]
