"""The worked examples of CONTRIBUTING do what they say: a file, an overlay and a test for each new part."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from src.cli import run
from src.mask import Mask

FILES: dict[str, str] = dict(
    re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", Path("CONTRIBUTING.md").read_text(), re.S)
)
EXAMPLES = {
    "direction": ("src/losses/direction.py", "configs/recover/direction.yaml"),
    "spread": ("src/policies/spread.py", "configs/policy/spread.yaml"),
    "labels": ("src/labels.py", "configs/recover/labels.yaml"),
}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of the page, importable under the names they would have in the repository."""
    for name, text in FILES.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for package in {str(Path(name).parent).replace("/", ".") for name in FILES if name.startswith("src/")}:
        module = importlib.import_module(package)
        place = str(tmp_path / package.replace(".", "/"))
        monkeypatch.setattr(module, "__path__", [*module.__path__, place])
    return tmp_path


def test_the_page_holds_a_file_an_overlay_and_a_test_for_each() -> None:
    wanted = {path for paths in EXAMPLES.values() for path in paths}
    assert FILES.keys() == wanted | {f"tests/numerics/test_{name}.py" for name in EXAMPLES}
    assert not any(Path(name).exists() for name in FILES), "examples, not parts of the product"


@pytest.mark.parametrize("name", EXAMPLES)
def test_its_test_passes(name: str, tree: Path) -> None:
    space: dict[str, Any] = {}
    exec(compile(FILES[f"tests/numerics/test_{name}.py"], name, "exec"), space)
    laws = [law for key, law in space.items() if key.startswith("test_")]
    assert laws
    for law in laws:
        law()


@pytest.mark.parametrize("name", EXAMPLES)
def test_its_overlay_runs(name: str, tree: Path, teacher_dir: str, corpus_file: str, mask_file: str) -> None:
    overlay = str(tree / EXAMPLES[name][1])
    search = name == "spread"
    config = "configs/search/gumbel_topk.yaml" if search else "configs/recover/entropy_kd.yaml"
    keys = {
        "model.init_args.model": teacher_dir, "data.init_args.train": corpus_file,
        "data.init_args.validation": corpus_file, "data.init_args.batch_size": 4, "trainer.max_steps": 2,
        "trainer.accelerator": "cpu", "trainer.limit_val_batches": 0,
        "trainer.logger.init_args.save_dir": tree, "trainer.logger.init_args.version": "run",
        **({"model.init_args.calibration_batches": 1} if search else {"model.init_args.mask": mask_file}),
    }  # fmt: skip
    done = run(["fit", "--config", config, "--config", overlay, *(f"--{k}={v}" for k, v in keys.items())])
    if search:
        assert Mask.load(tree / "search" / "run" / "mask.json").removed == (1, 4)
    else:
        figures = done.trainer.callback_metrics
        assert {"direction": "train/direction", "labels": "train/kd"}[name] in figures
        assert figures["train/loss"] > 0
