"""Recombined cuts from the search to the export: every policy that takes halves, every step behind it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from src import policies
from src.cli import main, run
from src.mask import Mask
from src.policies import MaskPolicy
from tests.integration.test_overlays import SEARCH, arguments

POLICIES = {
    "GumbelTopK": {}, "BypassBP": {}, "HardConcrete": {}, "LayerKL": {}, "OneShotPerplexity": {},
    "SLEB": {"always_keep": "[]"}, "RandomSearch": {"masks": 3}, "Exhaustive": {},
    "Taylor": {}, "Magnitude": {}, "LevelSwitch": {"generations": 2}, "PruneMerge": {},
    "Fisher": {}, "Grain": {},
}  # fmt: skip
KEEP = (0, 1, 2, 5, 6, 7, 10, 11)
"""Attention of layers 0, 1, 3, 5 and feed-forward of 0, 2, 3, 5: one recombined layer, and a gap."""


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_learns_a_mask_of_halves(
    policy: str, tmp_path: Path, teacher_dir: str, corpus_file: str
) -> None:
    keys: dict[str, Any] = {
        "trainer.max_steps": 2, "model.init_args.model": teacher_dir,
        "model.init_args.calibration_batches": 1, "model.init_args.policy": f"src.policies.{policy}",
        **{f"model.init_args.policy.init_args.{key}": value for key, value in POLICIES[policy].items()},
    }  # fmt: skip
    given = arguments(tmp_path, corpus_file, **keys)
    run(["fit", "--config", SEARCH, "--config", "configs/unit/half.yaml", *given])
    mask = Mask.load(tmp_path / "search" / "run" / "mask.json")
    assert (mask.unit, mask.method, mask.depth, len(mask.keep)) == ("half", policy, 4, 8)
    gates = json.loads((tmp_path / "search" / "run" / "gates.json").read_text())["keep_probability"]
    assert len(gates[-1]) == 12


def test_the_page_names_the_policies_that_take_halves() -> None:
    page = Path("docs/units.md").read_text().partition("# Narrower layers")[0]
    told = set(re.findall(r"^\| `(\w+)` \|", page, re.M))
    known = (value for value in vars(policies).values() if isinstance(value, type))
    takers = {each.__name__ for each in known if issubclass(each, MaskPolicy) and "half" in each.works_on}
    takers.remove("PromptMasks")  # of another search than this page's
    assert told == takers == set(POLICIES)


@pytest.fixture
def mask_file(tmp_path: Path, teacher_dir: str) -> str:
    mask = Mask(model=teacher_dir, num_layers=6, keep=KEEP, method="by hand", unit="half")
    mask.save(tmp_path / "mask.json")
    return str(tmp_path / "mask.json")


@pytest.mark.parametrize("scope", ["full", "cut_adjacent", "lora"])
def test_a_recombined_cut_is_recovered_exported_and_reported(
    scope: str, mask_file: str, tmp_path: Path, corpus_file: str
) -> None:
    keys = {
        "trainer.max_steps": 2, "model.init_args.mask": mask_file, "model.init_args.scope": scope,
        "model.init_args.lora_rank": 2,
        "model.init_args.terms": "[{term: {class_path: src.losses.HiddenStates, init_args: {layers: gaps}}}]",
    }  # fmt: skip
    run(["fit", "--config", "configs/recover/entropy_kd.yaml", *arguments(tmp_path, corpus_file, **keys)])
    checkpoint, out = tmp_path / "recover" / "run" / "checkpoints" / "last.ckpt", tmp_path / "out"
    main(["export", "--mask", mask_file, "--checkpoint", str(checkpoint), "--out", str(out)])
    card = (out / "README.md").read_text()
    assert "| Layers | 4 of 6; removed attention of [2, 4] and feed-forward of [1, 4] |" in card
    assert "| Kept layers | [0, 1 with feed-forward of 2, 3, 5] |" in card
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 4


@pytest.mark.parametrize("goal", ["parent", "diag"])
def test_a_recombined_cut_is_repaired(goal: str, mask_file: str, tmp_path: Path, corpus_file: str) -> None:
    out = tmp_path / "repaired"
    main(
        [
            "patch",
            "--mask",
            mask_file,
            "--data",
            corpus_file,
            "--goal",
            goal,
            "--rows",
            "8",
            "--out",
            str(out),
        ]
    )
    assert "| Repair |" in (out / "README.md").read_text()


def test_a_checkpoint_of_halves_fits_no_mask_of_layers(
    mask_file: str, tmp_path: Path, teacher_dir: str, corpus_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"trainer.max_steps": 1, "model.init_args.mask": mask_file}
    run(["fit", "--config", "configs/recover/entropy_kd.yaml", *arguments(tmp_path, corpus_file, **keys)])
    other = tmp_path / "other.json"
    Mask(model=teacher_dir, num_layers=6, keep=(0, 1, 3, 4), method="by hand").save(other)
    checkpoint = tmp_path / "recover" / "run" / "checkpoints" / "last.ckpt"
    with pytest.raises(SystemExit) as ended:
        main(
            ["export", "--mask", str(other), "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")]
        )
    assert ended.value.code == 2
    assert "Give the mask that it was trained with" in capsys.readouterr().err
