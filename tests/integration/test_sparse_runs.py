"""Recoveries that end with two of four weights at zero: masked, exported, resumed, planned, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from src.cli import main
from src.errors import ConfigError
from src.export.verb import main as export
from src.mask import Mask
from src.models.loading import load_model
from src.models.two_four import crowded, linear_maps
from tests.integration.test_resume import STEPS, broken_and_resumed
from tests.integration.test_terms import fit
from tests.planning import LAYER as WEIGHTS
from tests.planning import RECOVER, H, L, planner_of

OVERLAY = ["--config", "configs/recover/sparse_2_4.yaml"]
NORMS = 2 * 4 + 2 * H
"""Weights of a planned layer that are no linear map's: norms of queries and keys, and two of the stream."""


@pytest.fixture
def whole_mask(tmp_path: Path, teacher_dir: str) -> str:
    """A mask that removes nothing: the model itself is its own dense teacher."""
    Mask.by_hand(teacher_dir, 6, range(6)).save(tmp_path / "whole.json")
    return str(tmp_path / "whole.json")


def record(out: Path) -> dict[str, Any]:
    return json.loads((out / "recover" / "run" / "record.json").read_text())


@pytest.mark.parametrize("removes", ["nothing", pytest.param("layers", marks=pytest.mark.slow)])
def test_the_final_masking_changes_nothing_and_the_export_is_plain_and_sparse(
    removes: str, tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str, whole_mask: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The dense model distils itself; or depth first, and then the layers that stay."""
    mask = whole_mask if removes == "nothing" else mask_file
    done = fit(
        tmp_path, teacher_dir, corpus_file, mask, *OVERLAY, "--trainer.max_steps=100",
        "--model.init_args.optimizer.init_args.lr=0.01", "--trainer.limit_val_batches=1",
        "--model.init_args.optimizer.init_args.penalty=0.1",
        "--trainer.val_check_interval=100",
    )  # fmt: skip
    found = record(tmp_path)["sparse"]
    assert abs(found["change"]) < 1e-3
    assert 0 <= found["share"] < 1e-4
    assert crowded(done.model.model) == 0
    checkpoint = str(tmp_path / "recover" / "run" / "checkpoints" / "last.ckpt")
    export(["--mask", mask, "--checkpoint", checkpoint, "--out", str(tmp_path / "out")])
    assert "two of four" in capsys.readouterr().out
    back = load_model(str(tmp_path / "out"))
    ids = torch.arange(3, 23)[None]
    assert torch.equal(back(ids).logits, done.model.model.eval()(ids).logits)
    for name, (weight, axis) in linear_maps(back).items():
        fours = (weight == 0).movedim(axis, -1).unflatten(-1, (-1, 4)).sum(-1)
        assert fours.min() >= 2, name
        assert fours.float().mean() < 2.2, "and not more than it needs"
    assert (back.get_input_embeddings().weight == 0).float().mean() < 0.1


def test_killed_and_resumed_equals_uninterrupted(
    tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str
) -> None:
    """Masks, factors, moments and the ramp; the checkpoint lies between two renewals of the masks."""
    extra = [f"--model.init_args.mask={mask_file}", *OVERLAY, "--model.init_args.optimizer.init_args.renew=3"]
    broken_and_resumed(
        "configs/recover/entropy_kd.yaml", tmp_path, *extra, teacher=teacher_dir, corpus=corpus_file
    )
    states = [
        torch.load(tmp_path / name / f"step={STEPS}.ckpt", weights_only=False)["optimizer_states"][0]["state"]
        for name in ("whole", "broken")
    ]
    masks = [[s["kept"] for s in state.values() if "kept" in s] for state in states]
    assert len(masks[0]) == 4 * 7
    assert all(a.dtype == torch.bool and torch.equal(a, b) for a, b in zip(*masks, strict=True))


def test_a_checkpoint_from_before_the_end_is_not_exported(
    tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str
) -> None:
    saver = "{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {dirpath: %s, every_n_train_steps: 2, save_top_k: -1, filename: '{step}'}}"  # noqa: E501
    fit(tmp_path, teacher_dir, corpus_file, mask_file, *OVERLAY, f"--trainer.callbacks+={saver % tmp_path}")
    given = [
        "--mask",
        mask_file,
        "--checkpoint",
        str(tmp_path / "step=2.ckpt"),
        "--out",
        str(tmp_path / "out"),
    ]
    with pytest.raises(ConfigError, match=r"checkpoint: two of each four .* has not ended"):
        export(given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (
            ["--model.init_args.optimizer=torch.optim.AdamW"],
            "AdamW does not mask weights; give src.optim.AdamS",
        ),
        (["--model.init_args.scope=lora"], "model.scope: 'lora'"),
        (["--model.init_args.scope=cut_adjacent"], "model.scope: 'cut_adjacent'"),
        (["--config", "configs/strategy/fsdp2.yaml"], "trainer.strategy: 'fsdp2' shards"),
        (["--trainer.max_steps=-1", "--data.init_args.max_tokens=2000"], "trainer.max_steps: -1"),
        (["--data.init_args.max_tokens=2000"], "data.max_tokens: it may end"),
        (["--model.init_args.optimizer.init_args.penalty=-1"], "penalty: -1"),
    ],
)
def test_what_would_not_end_in_the_pattern_is_refused(
    more: list[str], told: str, tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    keys = {
        "model.init_args.model": teacher_dir, "model.init_args.mask": mask_file,
        "data.init_args.train": corpus_file, "trainer.accelerator": "cpu", "trainer.max_steps": 3,
        "trainer.devices": 1, "trainer.logger.init_args.save_dir": tmp_path,
    }  # fmt: skip
    given = ["fit", "--config", "configs/recover/entropy_kd.yaml", *OVERLAY]
    with pytest.raises(SystemExit) as ended:
        main([*given, *(f"--{key}={value}" for key, value in keys.items()), *more])
    text = capsys.readouterr().err
    assert (ended.value.code, text.count("error:")) == (2, 1)
    assert told in text
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_plan_counts_masks_and_factors(tmp_path: Path) -> None:
    """A byte for each weight of the linear maps; for each of their outputs a factor and its two moments."""
    few = {"data.init_args.batch_size": 1}
    plain = planner_of(tmp_path, RECOVER, **few).configured.parts["optimiser"]
    keys = {"trainer.callbacks+": "src.callbacks.Sparsify", "model.init_args.optimizer": "src.optim.AdamS"}
    sparse = planner_of(tmp_path, RECOVER, **few, **keys)
    maps, outputs = WEIGHTS - NORMS, 8 + 4 + 4 + H + 16 + 16 + H
    counters = 4 * (11 * (L - 1) + 2)  # torch's AdamW counts the steps of each tensor in one more
    assert sparse.configured.parts["optimiser"] == plain - counters + (L - 1) * (maps + 3 * 4 * outputs)


def test_a_run_in_parts_is_one_run(
    tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str
) -> None:
    """Micro-batches count once in the ramp: the last step ends it, and the weights are masked."""
    done = fit(
        tmp_path, teacher_dir, corpus_file, mask_file, *OVERLAY, "--trainer.accumulate_grad_batches=2",
        "--trainer.max_steps=2",
    )  # fmt: skip
    assert done.trainer.optimizers[0].param_groups[0]["ramp"] == 1.0
    assert crowded(done.model.model) == 0
