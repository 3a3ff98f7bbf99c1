"""The GPU parts, rehearsed on the CPU: what they select, skip, record and print."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.gpu import __main__ as runner
from scripts.gpu import laws, page, part, speed
from scripts.gpu.catalogue import CORE, PARTS, Part, chosen, missing
from scripts.gpu.shapes import random_model
from src.errors import ConfigError


def call(monkeypatch: pytest.MonkeyPatch, *argv: object) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu", *map(str, argv)])
    return runner.main()


def rehearsal(tmp_path: Path, name: str = "laws") -> list[str]:
    return [name, "--device", "cpu", "--tiny", "--out", f"{tmp_path}/gpu.json", "--work", f"{tmp_path}/work"]


def test_without_a_gpu_it_says_so_in_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(runner, "_cuda", lambda: False)
    out = tmp_path / "gpu.json"
    assert call(monkeypatch, "stages/8b", "laws", "--out", out, "--work", tmp_path / "work") == 0
    said = capsys.readouterr()
    assert said.out.startswith("no CUDA device: skipped.")
    assert "stages/8b/fsdp2" in said.out
    assert said.out.count("\n") == 1
    assert not said.err
    assert not list(tmp_path.iterdir())


def test_the_script_lists_its_parts() -> None:
    run = ["bash", "scripts/gpu_checks.sh", "headline", "--list"]
    listed = subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split()[0] for line in listed] == [
        f"headline/{x}" for x in ("teacher", "seed0", "seed1", "seed2")
    ]


def test_parts_are_chosen_by_the_beginning_of_their_names() -> None:
    assert chosen([]) == list(PARTS)
    assert len(chosen(["stages"])) == 2 * len(chosen(["stages/8b/"])) == 14
    assert [p.name for p in chosen(["speed", "laws", "speed"])] == ["speed", "laws"]
    with pytest.raises(ConfigError, match=r"no 'stage'.*'stages'"):
        chosen(["stage"])


def test_a_rehearsal_is_no_result(monkeypatch, capsys) -> None:
    assert call(monkeypatch, "laws", "--tiny", "--device", "cpu") == 2
    assert "--out" in capsys.readouterr().err


def test_each_part_has_a_module_and_a_table() -> None:
    for one in PARTS:
        assert importlib.util.find_spec(f"scripts.gpu.{one.module}")
        assert one.name.split("/")[0] in page.TABLES
    assert missing(["torch", "no_such_package"]) == ["no_such_package"]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a part whose module is given as text."""

    def run(source: str, needs: tuple[str, ...] = CORE) -> tuple[bool, dict[str, Any]]:
        (tmp_path / "module.py").write_text(source)
        code = f"import runpy, sys; runpy.run_path({str(tmp_path / 'module.py')!r}, run_name='__main__')"
        real = subprocess.Popen
        start = lambda command, **keys: real([sys.executable, "-c", code, *command[3:]], **keys)  # noqa: E731
        monkeypatch.setattr(runner.subprocess, "Popen", start)
        args = Namespace(
            device="cpu",
            seconds=1,
            tiny=True,
            commit="abc",
            out=tmp_path / "gpu.json",
            work=tmp_path / "work",
        )
        return runner.run(Part("speed", "", "speed", needs), args), part.read(args.out)

    return run


def test_a_part_that_fails_leaves_its_message_and_no_old_figures(fake, tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text(json.dumps({"laws": {"rows": [1]}, "speed": {"rows": ["old"]}}))
    passed, results = fake("print('some noise')\nraise MemoryError('CUDA out of memory')")
    assert not passed
    assert results["speed"]["error"] == "MemoryError: CUDA out of memory"
    assert "rows" not in results["speed"]
    assert results["speed"]["commit"] == "abc"
    assert results["laws"] == {"rows": [1]}
    assert "`speed` ended early: MemoryError" in page.page({"speed": results["speed"]})


def test_a_part_that_takes_too_long_is_stopped(fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "LIMIT", 1)
    passed, results = fake("import time; time.sleep(60)")
    assert not passed
    assert results["speed"]["error"] == "stopped after 1 s"


def test_a_part_without_its_packages_says_which(fake, capsys) -> None:
    assert fake("", needs=("torch", "no_such_package")) == (False, {})
    assert "missing: no_such_package" in capsys.readouterr().out


def test_the_last_words_are_the_error_not_the_command_that_failed() -> None:
    text = "Traceback\nerror: model: no such thing\nsubprocess.CalledProcessError: Command 'x' returned 2\n\n"
    assert part.last_words(text) == "error: model: no such thing"
    assert part.last_words("") == "it said nothing"


def test_sections_are_merged_in_the_order_of_the_parts(tmp_path: Path) -> None:
    for name in ("speed", "laws", "speed"):
        part.record(part.options(rehearsal(tmp_path, name)), {"rows": [name]})
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found) == ["laws", "speed"]
    assert found["speed"]["rows"] == ["speed"]
    assert {"command", "commit", "device", "torch", "driver", "versions"} <= set(found["speed"])


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


def test_speed_in_miniature_and_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["speed", *rehearsal(tmp_path, "speed")])
    speed.main()
    results = part.read(tmp_path / "gpu.json")
    assert results["speed"]["layers"] == [8, 6]
    assert [(r["batch_size"], r["phase"]) for r in results["speed"]["rows"]][:2] == [
        (1, "prefill"),
        (1, "decode"),
    ]
    page.main(tmp_path / "gpu.json", tmp_path / "gpu.md")
    text = (tmp_path / "gpu.md").read_text()
    assert "tokens/s, 8 layers | 6 layers" in text
    assert text.count("Not measured yet.") == len(page.TABLES) - 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["laws", "search_step", "loss", "stages/0.6b/single", "stages/0.6b/fsdp"])
def test_a_part_rehearsed_from_the_command_line(name: str, tmp_path: Path) -> None:
    run = ["bash", "scripts/gpu_checks.sh", *rehearsal(tmp_path, name)]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    section = part.read(tmp_path / "gpu.json")[name]
    assert section["rows"]
    if name == "stages/0.6b/single":
        assert all(row["tokens_per_s"] > 0 for row in section["rows"])
    if name == "stages/0.6b/fsdp":
        told = {row["stage"]: row.get("refused") or row.get("error") for row in section["rows"]}
        assert "configs/strategy/fsdp2.yaml" in told["search"]
        assert "GPU" in told["recover"]
