"""The GPU parts, rehearsed on the CPU: what they select, skip, record and print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.gpu import __main__ as runner
from scripts.gpu import laws, speed, stages
from scripts.gpu.__main__ import PARTS, chosen
from scripts.gpu.shapes import random_model
from scripts.lab.results import read

ENV = {**os.environ, "PYTHON": sys.executable}


def call(monkeypatch: pytest.MonkeyPatch, *argv: object) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu", *map(str, argv)])
    return runner.main()


def rehearsal(tmp_path: Path, name: str = "laws") -> list[str]:
    return [name, "--device", "cpu", "--tiny", "--out", f"{tmp_path}/gpu.json", "--work", f"{tmp_path}/work"]


def test_without_a_gpu_it_says_so_in_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "gpu.json"
    assert call(monkeypatch, "stages/8b", "laws", "--out", out, "--work", tmp_path / "work") == 0
    said = capsys.readouterr()
    assert said.out.startswith("no CUDA device: skipped.")
    assert "stages/8b/fsdp2" in said.out
    assert said.out.count("\n") == 1
    assert not said.err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_script_lists_its_parts() -> None:
    run = ["bash", "scripts/gpu_checks.sh", "stages/8b", "--list"]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=ENV)
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        f"stages/8b/{name}" for name in stages.VARIANTS
    ]


def test_parts_are_chosen_by_the_beginning_of_their_names() -> None:
    assert len(chosen(["stages"])) == 2 * len(chosen(["stages/8b"])) == 14
    assert chosen(["speed", "laws", "speed"]) == ["speed", "laws"]


def test_a_part_that_there_is_not_is_refused(monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit):
        call(monkeypatch, "stage", "--list")
    assert "stage: no such part; accepted: laws, speed, stages/" in capsys.readouterr().err
    call(monkeypatch, "--list")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(PARTS)


def test_a_rehearsal_is_no_result(monkeypatch, capsys) -> None:
    assert call(monkeypatch, "laws", "--tiny", "--device", "cpu") == 2
    assert "--out" in capsys.readouterr().err


def out_of_memory(args: Namespace) -> dict[str, Any]:
    raise MemoryError("CUDA out of memory")


def endless(args: Namespace) -> dict[str, Any]:
    time.sleep(60)
    return {}


def where(tmp_path: Path) -> Namespace:
    return Namespace(device="cpu", commit="abc", out=tmp_path / "gpu.json", work=tmp_path / "work")


def test_a_part_that_fails_leaves_its_message_and_no_old_figures(tmp_path, monkeypatch) -> None:
    (tmp_path / "gpu.json").write_text(json.dumps({"laws": {"rows": [1]}, "speed": {"rows": ["old"]}}))
    monkeypatch.setitem(PARTS, "speed", ("", out_of_memory))
    assert not runner.run("speed", where(tmp_path))
    results = read(tmp_path / "gpu.json")
    assert results["speed"]["error"] == "MemoryError: CUDA out of memory"
    assert "rows" not in results["speed"]
    assert results["speed"]["commit"] == "abc"
    assert results["laws"] == {"rows": [1]}
    assert "Traceback" in (tmp_path / "work/speed.log").read_text()


def test_a_part_that_takes_too_long_is_stopped(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(runner, "LIMIT", 0.5)
    monkeypatch.setitem(PARTS, "speed", ("", endless))
    assert not runner.run("speed", where(tmp_path))
    assert read(tmp_path / "gpu.json")["speed"]["error"] == "stopped after 0.5 s"


def test_the_last_words_are_the_error_not_the_command_that_failed() -> None:
    assert (
        stages.last_words("Traceback\nerror: model: no such thing\nnote: x\n\n")
        == "error: model: no such thing"
    )
    assert stages.last_words("[rank1]: ValueError: x\n") == "ValueError: x"
    assert stages.last_words("") == "it said nothing"


@pytest.mark.slow
def test_sections_are_merged_in_the_order_of_the_parts(tmp_path, monkeypatch) -> None:
    for name in ("speed", "laws"):
        monkeypatch.setitem(PARTS, name, ("", where_am_i))
        assert runner.run(name, where(tmp_path))
    found = read(tmp_path / "gpu.json")
    assert list(found) == ["laws", "speed"]
    assert found["speed"]["rows"] == ["cpu"]
    assert {"command", "commit", "device", "driver", "versions"} <= set(found["speed"])


def where_am_i(args: Namespace) -> dict[str, Any]:
    return {"rows": [args.device]}


def test_the_laws_hold_in_bf16_and_betray_an_inexact_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("llama", "cpu", torch.bfloat16, tiny=True)
    found = laws.laws(model)
    assert found["repeats"]
    assert found["open_is_teacher"]
    assert found["hard_is_cut"]
    assert found["largest_difference"] == 0
    with monkeypatch.context() as patch:
        patch.setattr(torch, "lerp", lambda a, b, w: a + w * (b - a))
        broken = laws.laws(model)
    assert not broken["open_is_teacher"]
    assert broken["largest_difference"] > 0
    error = laws.gradients(model)
    assert error["gradient_of_closed_layers_exact"]
    assert 0 < error["gradient_error"] < 0.1


def test_speed_in_miniature() -> None:
    found = speed.measure(Namespace(device="cpu", tiny=True))
    assert found["layers"] == [8, 6]
    assert [(r["batch_size"], r["phase"]) for r in found["rows"]][:2] == [(1, "prefill"), (1, "decode")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["laws", "speed", "stages/0.6b/single", "stages/0.6b/fsdp"])
def test_a_part_rehearsed_from_the_command_line(name: str, tmp_path: Path) -> None:
    run = ["bash", "scripts/gpu_checks.sh", *rehearsal(tmp_path, name)]
    done = subprocess.run(run, capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stdout + done.stderr
    section = read(tmp_path / "gpu.json")[name]
    assert section["rows"]
    if name == "stages/0.6b/single":
        assert all(row["tokens_per_s"] > 0 for row in section["rows"])
    if name == "stages/0.6b/fsdp":
        told = {row["stage"]: row.get("refused") or row.get("error") for row in section["rows"]}
        assert "configs/strategy/fsdp2.yaml" in told["search"]
        assert "GPU" in told["recover"]
