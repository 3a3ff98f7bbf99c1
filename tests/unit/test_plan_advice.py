"""What a plan advises, and the command that prints it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from src.cli import run
from src.errors import ConfigError
from src.plan.advice import advise, ways
from src.plan.devices import GIB, device, this_machine
from src.plan.memory import strategy_name
from src.plan.planner import Planner
from tests.planning import (
    CACHE,
    PLENTY,
    RECOVER,
    SEARCH,
    planner_of,
    write_config,
)

Make = Callable[..., Planner]


@pytest.fixture
def plan(tmp_path: Path) -> Make:
    return partial(planner_of, tmp_path)


def test_a_device_one_byte_too_small_is_too_small(plan: Make) -> None:
    planner = plan(SEARCH)
    plain, recomputed = planner.way("shared", "single", False), planner.way("shared", "single", True)
    packed = planner.way("int8", "single", True)
    assert packed.total < recomputed.total < plain.total

    def best(size: int) -> Any:
        planner.device = replace(PLENTY, memory=size)
        return advise(planner)

    assert best(plain.total).best == plain
    assert best(plain.total).options == ()
    assert not best(plain.total - 1).best.setting.quantize
    assert best(plain.total - 1).options == ("--trainer.callbacks+=src.callbacks.CheckpointActivations",)
    assert best(recomputed.total - 1).best.setting.quantize == "int8"
    assert "--model.init_args.quantize int8" in best(recomputed.total - 1).options
    nothing = best(1000)
    assert nothing.best is None
    assert "bfloat16" in nothing.reason


def test_a_recovery_without_room_reads_a_cache(plan: Make) -> None:
    planner = plan(RECOVER)
    live, cached = planner.way("copy", "single", True), planner.way("cached", "single", False)
    plain = planner.way("copy", "single", False)
    assert plain.total - cached.total == plain.parts["teacher"]
    planner.device = replace(PLENTY, memory=live.total - 1)
    assert advise(planner).best.setting.mode == "cached"  # type: ignore[union-attr]
    assert "--config configs/cache/recover.yaml" in advise(planner).options
    assert advise(planner, disk=1).best.setting.mode == "int8"  # type: ignore[union-attr]
    assert cached.hours < plain.hours, "the teacher's pass is saved"


@pytest.mark.slow
def test_a_cache_is_no_way_out_where_streams_or_all_tokens_are_compared(plan: Make) -> None:
    """A cache holds the likeliest of the teacher's tokens alone; the run would refuse it."""
    term = "{term: {class_path: src.losses.%s}, weight: 1}"
    planners = {
        name: plan(RECOVER, **{"model.init_args.terms": f"[{term % name}]"})
        for name in ("HiddenStates", "CrossEntropy")
    }
    planners["all tokens"] = plan(RECOVER, **{"model.init_args.distillation.init_args.k": "null"})
    for planner in planners.values():
        planner.device = replace(PLENTY, memory=planner.way("copy", "single", True).total - 1)
    found = {name: advise(planner).best for name, planner in planners.items()}
    assert found["HiddenStates"] is not None
    assert found["HiddenStates"].setting.mode == "int8"
    assert found["CrossEntropy"] is not None
    assert found["CrossEntropy"].setting.mode == "cached"
    assert found["all tokens"] is not None
    assert found["all tokens"].setting.mode == "int8"


def test_ways_are_legal_pairs() -> None:
    """What a stage refuses is never recommended; sharding needs ranks."""
    for stage in ("search", "recover", "cache"):
        for ranks in (1, 2):
            for mode, strategy, _, offload in ways(stage, ranks):
                assert ranks > 1 or strategy != "fsdp2"
                assert strategy not in ("fsdp", "deepspeed_z3") or stage == "recover"
                assert not (stage != "recover" and mode in ("int8", "nf4") and strategy == "fsdp2")
                assert not offload or strategy == "deepspeed_z3"


def test_strategies_are_known_by_any_of_their_names() -> None:
    assert [strategy_name(name, 1) for name in ("auto", "ddp", "deepspeed_stage_3")] == [
        "single",
        "ddp",
        "deepspeed_z3",
    ]
    assert strategy_name("auto", 2) == "ddp"
    with pytest.raises(ConfigError, match="'horovod' cannot be planned"):
        strategy_name("horovod", 1)


# ---------------------------------------------------------------- the command


def test_command_writes_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    argv = ["--config", SEARCH, "--config", "configs/strategy/fsdp2.yaml", "--trainer.max_steps=10"]
    argv += [f"--model.init_args.model={write_config(tmp_path / 'tiny.json')}"]
    run(["plan", *argv, "--device", "h100", "--devices", "2", "--json", str(out)])
    written = json.loads(out.read_text())
    assert written["configured"]["strategy"] == "fsdp2"
    assert written["tokens"] == 10 * 16 * 256 * 2
    assert written["configured"]["total"] == sum(written["configured"]["parts"].values())
    assert written["recommended"]["way"]["strategy"] == "ddp"
    assert written["device"]["memory"] == 79 * GIB
    assert "as configured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([SEARCH, "--device", "h1000"], r"--device: 'h1000' is unknown; accepted: h100, .*mean 'h100'"),
        ([SEARCH, "--model.init_args.modle=x"], r"modle.*Did you mean"),
        (
            [SEARCH, "--model.init_args.model=no/such/file.json"],
            r"model: cannot read a config from 'no/such/f",
        ),
        ([RECOVER, "--model.init_args.mask=no.json"], r"mask: 'no.json' does not exist yet; give"),
        ([CACHE], r"--tokens: nothing says when this run ends"),
        (["configs/teacher/arithmetic.yaml"], r"'Pretrain' cannot be planned; accepted: MaskSearch, Rec"),
        ([SEARCH, "--devices", "none"], r"--devices.*a whole number above 0"),
    ],
)
def test_faults_have_one_clear_message(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(["plan", "--config", *argv])


def test_this_machines_cpu_is_measured() -> None:
    cpu = device("cpu")
    assert cpu.memory > GIB
    assert 1e-4 < cpu.tflops["float32"] < 1e3
    assert not cpu.gpu


@pytest.mark.parametrize(
    ("title", "gib", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100"), ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40"),
        ("NVIDIA H200", 139.8, "h200"), ("Tesla T4", 14.6, None),
    ],
)  # fmt: skip
def test_a_gpu_is_known_by_its_title_and_memory(
    title: str, gib: float, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: title)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, int(gib * GIB)))
    assert this_machine() == name
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert this_machine() == "cpu"
