"""What ranks save holds the student alone, resumes on other ranks, and is exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from src.cli import run
from src.errors import ConfigError
from src.mask import Mask
from src.models.cut import cut
from src.models.loading import load_model
from src.training import checkpoints
from src.training.scopes import load_student
from tests.distributed.launch import Bench, diary, drift, saver

SAVED, STEPS, TOLERANCE = 4, 8, 1e-5
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("stage", "overlay", "before", "after"),
    [
        ("recover", "fsdp2", 2, 1),
        ("recover", "fsdp2", 1, 2),
        ("recover", "ddp", 2, 1),
        ("recover", "ddp", 1, 2),
        ("search", "fsdp2", 2, 1),
    ],
)
def test_resumed_on_another_number_of_ranks(
    stage: str, overlay: str, before: int, after: int, bench: Bench
) -> None:
    """The steps after the checkpoint are those of the run that went on."""
    keys = {"trainer__max_steps": STEPS, "callbacks": [saver(bench.out / "saved", SAVED)]}
    whole = diary(bench.fit("whole", stage, overlay, before, **keys))
    saved = bench.out / "saved" / f"step={SAVED}.ckpt"
    keys = {"trainer__max_steps": STEPS, "ckpt_path": saved}
    resumed = bench.fit("resumed", stage, overlay, after, **keys)
    assert drift(whole[SAVED:], diary(resumed), "loss")[0] <= TOLERANCE
    if stage == "search":
        assert drift(whole[SAVED:], diary(resumed), "logits")[0] <= TOLERANCE
        masks = [Mask.load(next((bench.out / name).rglob("mask.json"))).keep for name in ("whole", "resumed")]
        assert masks[0] == masks[1]


def test_a_checkpoint_in_parts_is_small_and_exported(bench: Bench, tmp_path: Path) -> None:
    """No more than the student and its two moments; the export has the weights of one process's run."""
    teacher = "assets/arithmetic-teacher"
    bench.teacher, bench.mask = teacher, str(tmp_path / "wide.json")
    mask = Mask(model=teacher, num_layers=16, keep=tuple(range(12)), method="test")
    mask.save(bench.mask)
    keys = {"trainer__max_steps": 2}
    paths = {}
    for overlay, ranks in (("single", 1), ("fsdp2", 2)):
        saving = [saver(bench.out / f"{overlay}-saved", 2)]
        bench.fit(overlay, "recover", overlay, ranks, callbacks=saving, **keys)
        paths[overlay] = bench.out / f"{overlay}-saved" / "step=2.ckpt"
    parent = load_model(teacher)
    student = cut(parent, mask)
    weights = dict(student.named_parameters())
    bound = 3 * 4 * sum(p.numel() for p in weights.values())
    bound += 2500 * 3 * 2 * len(weights)  # the frame of each tensor's part from each rank
    assert paths["fsdp2"].is_dir()
    for path in paths.values():
        files = [path] if path.is_file() else list(path.rglob("*"))
        assert sum(file.stat().st_size for file in files) <= bound
        assert {key.removeprefix("model.") for key in checkpoints.weights(str(path))} == {
            *student.state_dict()
        }
    one, parts = (load_student(parent, mask, str(path)) for path in paths.values())
    for (name, a), b in zip(one.state_dict().items(), parts.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    out = tmp_path / "exported"
    given = ["--mask", bench.mask, "--checkpoint", str(paths["fsdp2"]), "--out", str(out)]
    run(["export", *given])
    assert (out / "model.safetensors").is_file()
    next(paths["fsdp2"].glob("*.distcp")).unlink()
    with pytest.raises(ConfigError, match="missing or damaged"):
        load_student(parent, mask, str(paths["fsdp2"]))
