"""What docs/recovery.md says of learning one by one in Qwen3-32B is what ``plan`` computes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from src.mask import Mask
from src.plan.devices import GIB, device
from src.plan.experiment import Experiment
from src.plan.planner import Planner

PARENT, LAYERS = "configs/models/qwen3-32b.json", 64
LOCAL = ("--config", "configs/recover/local.yaml")
ROWS = {
    "through the model": ((), range(44, 60)),
    "one by one, 16 gaps": (LOCAL, range(2, 63, 4)),
    "one by one, one gap": (LOCAL, range(44, 60)),
}
"""Each way with its overlays and the removed layers, by the name of its row."""


def told(tmp_path: Path, overlays: tuple[str, ...], removed: range) -> list[str]:
    """Weights that train, memory and hours on one H200, for 10 M tokens in rows of 2,048."""
    Mask.by_hand(PARENT, LAYERS, (i for i in range(LAYERS) if i not in removed)).save(tmp_path / "mask.json")
    keys = {"mask": tmp_path / "mask.json", "model": PARENT, "dtype": "bfloat16"}
    given = [f"--model.init_args.{key}={value}" for key, value in keys.items()]
    argv = ["--config", "configs/recover/entropy_kd.yaml", *overlays, *given, "--data.init_args.batch_size=1"]
    planner = Planner(Experiment(argv, length=2048), device("h200"), 1, 10_000_000)
    found, parts = planner.configured, planner.configured.parts
    trained = parts["gradients"] + parts["optimiser"]
    sizes = [f"{size / GIB:.1f}" for size in (trained, found.total)]
    return [f"{planner.trace().trainable / 1e9:.2f} B", *sizes, f"{found.hours:.1f}"]


def table() -> dict[str, list[str]]:
    (rows,) = re.findall(r"<!-- plan -->\n(.*?)<!-- /plan -->", Path("docs/recovery.md").read_text(), re.S)
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows.strip().splitlines()[2:]]
    return {name: rest for name, *rest in cells}


def test_the_page_has_a_row_of_each_way() -> None:
    assert table().keys() == ROWS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_the_figures_of_the_page_are_those_of_plan(name: str, tmp_path: Path) -> None:
    assert told(tmp_path, *ROWS[name]) == table()[name]
