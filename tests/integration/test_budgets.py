"""One search, many budgets, from the command line to exports of each; killed, resumed, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from src.cli import main, run
from src.mask import Mask
from src.report.verb import main as report
from tests.integration.test_overlays import SEARCH, arguments
from tests.integration.test_resume import SAVED, broken_and_resumed

OVERLAY = ["--config", "configs/search/budgets.yaml"]
SIXTHS = "[0.5, 0.16666, 0.33333]"
"""Three, one and two of six layers, in any order."""
NAMES = ["mask-0.16666.json", "mask-0.33333.json", "mask-0.5.json"]


def keys(teacher: str, **more: Any) -> dict[str, Any]:
    return {
        "trainer.max_steps": 2, "model.init_args.model": teacher, "model.init_args.budgets": SIXTHS,
        "model.init_args.calibration_batches": 1, **more,
    }  # fmt: skip


def masks(out: Path) -> list[Mask]:
    """The masks of the three budgets, the smallest removal first."""
    folder = out / "search" / "run"
    assert sorted(path.name for path in folder.glob("mask*.json")) == [*NAMES, "mask.json"]
    assert (folder / "mask.json").read_bytes() == (folder / NAMES[-1]).read_bytes(), "the largest removal"
    return [Mask.load(folder / name) for name in NAMES]


@pytest.mark.parametrize("unit", ["layer", "half"])
@pytest.mark.parametrize("policy", ["GumbelTopK", "SLEB"])
def test_one_search_ends_with_a_mask_for_each_budget(
    policy: str, unit: str, tmp_path: Path, teacher_dir: str, corpus_file: str
) -> None:
    more = {
        "model.init_args.policy": f"src.policies.{policy}", "model.init_args.unit": unit,
        "model.init_args.policy.init_args.always_keep": "[]", "model.init_args.nested": "true",
        "trainer.limit_val_batches": 1, "trainer.val_check_interval": 2,
        "trainer.check_val_every_n_epoch": "null",
    }  # fmt: skip
    given = arguments(tmp_path, corpus_file) + [
        f"--{key}={value}" for key, value in keys(teacher_dir, **more).items()
    ]
    done = run(["fit", "--config", SEARCH, *OVERLAY, *given])
    found = masks(tmp_path)
    assert [mask.num_layers - mask.depth for mask in found] == [1, 2, 3]
    assert {*found[2].keep} < {*found[1].keep} < {*found[0].keep}
    record = json.loads((tmp_path / "search" / "run" / "record.json").read_text())
    assert [(each["mask"], each["removed"], each["kl"]) for each in record["budgets"]] == [
        (name, count, mask.metrics["kl"]) for name, count, mask in zip(NAMES, (1, 2, 3), found, strict=True)
    ]
    measured = done.trainer.callback_metrics
    assert measured["val/kl"] == measured["val/kl-0.5"] != measured["val/kl-0.33333"]


def test_each_mask_is_recovered_exported_and_reported(
    tmp_path: Path, teacher_dir: str, corpus_file: str
) -> None:
    given = arguments(tmp_path, corpus_file, **keys(teacher_dir))
    run(["fit", "--config", SEARCH, *OVERLAY, *given])
    for name, mask in zip(NAMES, masks(tmp_path), strict=True):
        file, out = tmp_path / "search" / "run" / name, tmp_path / f"out-{mask.depth}"
        checkpoint = []
        if mask.depth == 4:
            more = {"trainer.max_steps": 1, "model.init_args.mask": file}
            run(["fit", "--config", "configs/recover/entropy_kd.yaml",
                 *arguments(tmp_path, corpus_file, **more)])  # fmt: skip
            checkpoint = ["--checkpoint", str(tmp_path / "recover/run/checkpoints/last.ckpt")]
        main(["export", "--mask", str(file), "--out", str(out), *checkpoint])
        assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == mask.depth
    exported = [str(tmp_path / f"out-{depth}") for depth in (5, 3)]
    main(["evaluate", "--teacher", teacher_dir, "--model", *exported, "--data", corpus_file, "--limit", "4",
          "--no-exact-match", "--out", str(tmp_path / "evaluate.json")])  # fmt: skip
    (tmp_path / "search" / "run").rename(tmp_path / "moved")
    (tmp_path / "search").rmdir()
    (tmp_path / "moved").rename(tmp_path / "search")
    report(["--run", str(tmp_path)])
    page, mask = (tmp_path / "report.md").read_text(), Mask.load(tmp_path / "search" / NAMES[1])
    assert f"| 0.33333 | 2 of 6 | {mask.metrics['kl']:.4f} | {NAMES[1]} |" in page
    assert "figures/budgets.svg" in page
    assert f"{mask.metrics['kl']:.4f}" in (tmp_path / "figures" / "budgets.svg").read_text()
    assert NAMES[1] in (tmp_path / "report.html").read_text()


def test_adapters_are_saved_beside_each_mask(tmp_path: Path, teacher_dir: str, corpus_file: str) -> None:
    adapters = "{class_path: src.training.adapters.LoRA, init_args: {rank: 2}}"
    given = arguments(tmp_path, corpus_file, **keys(teacher_dir, **{"model.init_args.adapters": adapters}))
    run(["fit", "--config", SEARCH, *OVERLAY, *given])
    for name in NAMES[:2]:
        more = {"trainer.max_steps": 1, "model.init_args.mask": tmp_path / "search" / "run" / name,
                "model.init_args.patch": "adapters"}  # fmt: skip
        run(["fit", "--config", "configs/recover/entropy_kd.yaml",
             *arguments(tmp_path / name, corpus_file, **more)])  # fmt: skip


def test_a_killed_and_resumed_search_ends_with_the_same_masks(
    tmp_path: Path, teacher_dir: str, corpus_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = ["--config=configs/search/budgets.yaml", "--model.init_args.calibration_batches=2",
             f"--model.init_args.budgets={SIXTHS}"]  # fmt: skip
    broken_and_resumed(SEARCH, tmp_path, *extra, teacher=teacher_dir, corpus=corpus_file)
    saved = f"--ckpt_path={tmp_path / 'broken' / f'step={SAVED}.ckpt'}"
    assert masks(tmp_path / "whole") == masks(tmp_path / "broken")
    given = [*extra[:2], "--model.init_args.budgets=[0.5]", saved]
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", SEARCH, *given, f"--model.init_args.model={teacher_dir}",
              f"--data.init_args.train={corpus_file}", f"--data.init_args.validation={corpus_file}",
              "--data.init_args.batch_size=3", "--trainer.accelerator=cpu",
              f"--trainer.logger.init_args.save_dir={tmp_path}/other"])  # fmt: skip
    assert "model.init_args.budgets was [0.5, 0.16666, 0.33333] and is now [0.5]" in capsys.readouterr().err
