"""``last.ckpt`` is the last step, whichever way a run ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning import LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from src.callbacks import LastCheckpoint, last

ROWS = 10
pytestmark = pytest.mark.filterwarnings("ignore")


class Line(LightningModule):
    """One layer that each row moves."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(folder: Path, steps: int, every: int = 4, **keys: Any) -> Line:
    seed_everything(0)
    saver = LastCheckpoint(
        dirpath=folder, every_n_train_steps=every, save_top_k=1, save_last=True, enable_version_counter=False
    )
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", callbacks=[saver], logger=False, enable_progress_bar=False,
        enable_model_summary=False, **keys,
    )  # fmt: skip
    line = Line()
    rows = torch.arange(ROWS, dtype=torch.float32)[:, None]
    trainer.fit(line, torch.utils.data.DataLoader(rows))
    assert [p.name for p in folder.glob("last*")] == ["last.ckpt"]
    return line


def saved(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "last.ckpt", weights_only=False)


@pytest.mark.parametrize("steps", [3, 4, 7])
def test_a_run_of_any_length_leaves_its_last_step(steps: int, tmp_path: Path) -> None:
    line = fit(tmp_path, steps)
    assert saved(tmp_path)["global_step"] == steps
    assert torch.equal(saved(tmp_path)["state_dict"]["layer.weight"], line.layer.weight)


def test_a_run_that_ends_with_its_data_leaves_its_last_step(tmp_path: Path) -> None:
    line = fit(tmp_path, -1, max_epochs=1)
    assert saved(tmp_path)["global_step"] == ROWS
    assert torch.equal(saved(tmp_path)["state_dict"]["layer.weight"], line.layer.weight)


def test_the_last_step_resumes_as_any_other_does(tmp_path: Path) -> None:
    """The epoch in whose middle the run ends is not yet counted as complete."""
    fit(tmp_path / "off", 7)
    fit(tmp_path / "on", 7, every=7)
    assert saved(tmp_path / "off")["loops"] == saved(tmp_path / "on")["loops"]


def test_a_second_run_in_the_same_directory_replaces_the_first(tmp_path: Path) -> None:
    fit(tmp_path, 7)
    fit(tmp_path, 6)
    assert saved(tmp_path)["global_step"] == 6


@pytest.mark.parametrize(("together", "written"), [(1, [3, 4, 7, 8, 9]), (2, [2, 4])])
def test_where_steps_are_slow_it_is_written_by_the_clock(
    together: int, written: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each batch takes 4 of 10 minutes. A save at every fourth step starts the clock anew, and none falls
    between batches that are accumulated."""
    clock, steps, real = [0.0], list[int](), LastCheckpoint.on_train_batch_end

    def slow(self: LastCheckpoint, trainer: Trainer, *args: Any) -> None:
        clock[0] += 4 * 60
        before = self._last_global_step_saved
        real(self, trainer, *args)
        if self._last_global_step_saved != before:
            steps.append(trainer.global_step)
            assert saved(tmp_path)["global_step"] == trainer.global_step

    monkeypatch.setattr(last.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(LastCheckpoint, "on_train_batch_end", slow)
    fit(tmp_path, 9 // together, accumulate_grad_batches=together)
    assert steps == written


def test_every_shipped_config_uses_it() -> None:
    found = 0
    for path in Path("configs").rglob("*.yaml"):
        trainer = (yaml.safe_load(path.read_text()) or {}).get("trainer") or {}
        for callback in trainer.get("callbacks") or trainer.get("callbacks+") or []:
            if isinstance(callback, dict) and (callback.get("init_args") or {}).get("save_last"):
                assert callback["class_path"] == "src.callbacks.LastCheckpoint", path
                assert callback["init_args"]["enable_version_counter"] is False, path
                found += 1
    assert found >= 4
