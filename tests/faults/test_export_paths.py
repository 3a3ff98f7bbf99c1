"""Every way to a smaller model ends in an export: each scope of a recovery, each repair, several families.

Equal weights are equal, however they came: frozen or trained, adapted and merged, folded or distilled.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel

from src.cli import main
from src.data.arithmetic import build_tokenizer
from src.mask import Mask, Unit
from src.models.adapters import adapted, out_of_reach
from src.recover import Recovery
from src.repair.verb import METHODS
from tests.faults.directories import refused
from tests.tiny import tiny_model

KEEP = (0, 2, 3, 5)
FAMILIES = ("llama", "qwen3", "mixtral")
SCOPES = ("full", "cut_adjacent", "lora")
REPAIRS: dict[str, dict[str, Any]] = {
    "none": {},
    "parent": {"goal": "parent"},
    "rotate": {"goal": "rotate"},
    "diag": {"goal": "diag"},
    "rotate-distilled": {"goal": "rotate", "distill_steps": 2, "lr": 1e-2},
    "diag-distilled": {"goal": "diag", "distill_steps": 2, "lr": 1e-2},
    "scales": {"method": "mask_tuning"},
}


def often(family: str, repair: str) -> bool:
    """Return whether another case that always runs shows nearly the same."""
    return family == "qwen3" or (family == "mixtral" and repair not in ("none", "rotate-distilled", "scales"))


@pytest.fixture(scope="session")
def family_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny parent of each family with the arithmetic tokenizer."""
    tokenizer, found = build_tokenizer(), {}
    for family in (*FAMILIES, "gemma2"):
        path = tmp_path_factory.mktemp(family)
        model = tiny_model(family, vocab_size=len(tokenizer), num_hidden_layers=6, layer_types=None)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        found[family] = str(path)
    return found


@pytest.fixture
def parent(request: pytest.FixtureRequest, family_dirs: dict[str, str], tmp_path: Path) -> str:
    """Directory of the parent of the family asked for; its mask lies in ``mask.json``."""
    path = family_dirs[request.param]
    Mask(model=path, num_layers=6, keep=KEEP, method="test").save(tmp_path / "mask.json")
    return path


def recovered(mask: Path, out: Path, scope: Any, repair: dict[str, Any], rows: str) -> PreTrainedModel:
    """A checkpoint as a recovery leaves it after a step of every weight that trains; its model."""
    kind, keys = (
        METHODS[repair.get("method", "linear_patch")],
        {k: v for k, v in repair.items() if k != "method"},
    )
    patch = kind(rows, rows=8, device="cpu", **keys) if repair else None
    made = Recovery(str(mask), scope=scope, lora_rank=2, patch=patch)
    made.configure_model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    saved: dict[str, Any] = {"state_dict": made.state_dict()}
    made.on_save_checkpoint(saved)
    torch.save(saved, out)
    return made.model


def exported(out: Path) -> str:
    """The card of an export, which exists only if all was proven."""
    card = (out / "README.md").read_text()
    assert "| logits = original | equal to the last bit |" in card
    return card


@pytest.mark.parametrize(
    ("parent", "scope", "repair"),
    [
        pytest.param(family, scope, repair, marks=pytest.mark.slow if often(family, repair) else ())
        for family in FAMILIES
        for scope in SCOPES
        for repair in REPAIRS
    ],
    indirect=["parent"],
)
def test_a_recovery_of_every_scope_and_repair_is_exported(
    parent: str,
    scope: str,
    repair: str,
    tmp_path: Path,
    corpus_file: str,
) -> None:
    out, checkpoint = tmp_path / "out", tmp_path / "last.ckpt"
    recovered(tmp_path / "mask.json", checkpoint, scope, REPAIRS[repair], corpus_file)
    main(
        ["export", "--mask", str(tmp_path / "mask.json"), "--checkpoint", str(checkpoint), "--out", str(out)]
    )
    card = exported(out)
    assert f"({scope})" in card
    assert "not reached by the adapters" not in card, "peft adapts Mixtral's experts too"


@pytest.mark.parametrize("repair", [name for name in REPAIRS if name != "none"])
@pytest.mark.parametrize("parent", FAMILIES, indirect=True)
def test_every_repair_alone_is_exported(parent: str, repair: str, tmp_path: Path, corpus_file: str) -> None:
    out = tmp_path / "out"
    main(["patch", "--mask", str(tmp_path / "mask.json"), "--data", corpus_file, "--out", str(out)]
         + [f"--{key.replace('_', '-')}={value}" for key, value in REPAIRS[repair].items()])  # fmt: skip
    assert "fitted to" in exported(out)


@pytest.mark.parametrize("unit", ["half", "kv_group", "channel"])
@pytest.mark.parametrize("parent", ["llama"], indirect=True)
def test_scales_are_exported_for_every_unit(
    unit: Unit, parent: str, tmp_path: Path, corpus_file: str
) -> None:
    """Where LinearPatch has no gap to repair; what is reloaded computes what was tuned, to the last bit."""
    width = {"kv_group": 2, "channel": 48}.get(unit)
    keep = {"half": (0, 3, 4, 5, 6, 7, 8, 11), "kv_group": tuple(range(1, 12, 2))}.get(
        unit, tuple(u for u in range(6 * 48) if u % 4)
    )
    Mask(parent, 6, keep, "test", unit=unit, width=width).save(tmp_path / "mask.json")
    argv = ["patch", "--method=mask_tuning", "--mask", str(tmp_path / "mask.json"), "--data", corpus_file]
    main([*argv, "--out", str(tmp_path / "out"), "--rows=8"])
    assert "scales of attention heads and feed-forward channels fitted to" in exported(tmp_path / "out")


@pytest.mark.parametrize("parent", ["llama"], indirect=True)
def test_a_setting_of_another_repair_is_refused(
    parent: str, tmp_path: Path, corpus_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["patch", "--method=mask_tuning", "--mask", str(tmp_path / "mask.json"), "--data", corpus_file]
    message = refused([*argv, "--out", str(tmp_path / "out"), "--goal=rotate"], capsys)
    assert "--goal: --method mask_tuning has no such setting" in message


@pytest.mark.parametrize("parent", ["gemma2"], indirect=True)
def test_a_repair_that_nothing_can_hold_is_refused_with_what_works(
    parent: str,
    tmp_path: Path,
    corpus_file: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The maps of Gemma-2 write through a norm. What its mask can do is named, and works."""
    argv = ["--mask", str(tmp_path / "mask.json"), "--out", str(tmp_path / "out")]
    message = refused(["patch", *argv, "--data", corpus_file, "--rows=4"], capsys)
    assert "nothing can be folded into layer" in message
    assert "of this 'gemma2'" in message
    assert "Leave the repair out" in message
    assert not (tmp_path / "out").exists()
    main(["export", *argv])
    exported(tmp_path / "out")


@pytest.mark.parametrize("parent", ["llama"], indirect=True)
def test_a_repair_names_the_split_of_its_rows(
    parent: str,
    tmp_path: Path,
    corpus_file: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Rows of one split, and of no other, decide its weights; they are those of a file that holds them."""
    rows = [json.loads(line) for line in Path(corpus_file).read_text().splitlines()]
    parts = {"train": rows[:20], "test": rows[20:]}
    DatasetDict({name: Dataset.from_list(part) for name, part in parts.items()}).save_to_disk(
        tmp_path / "both"
    )
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in parts["test"]))
    mask = ["patch", "--mask", str(tmp_path / "mask.json")]
    unnamed = refused([*mask, "--data", str(tmp_path / "both"), "--out", str(tmp_path / "none")], capsys)
    assert "has the splits train, test. Name one" in unnamed
    assert not (tmp_path / "none").exists()
    weights = []
    for out, data in (("split", ["both", "--split", "test"]), ("file", ["test.jsonl"])):
        main([*mask, "--data", str(tmp_path / data[0]), *data[1:], "--out", str(tmp_path / out)])
        weights.append((tmp_path / out / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.slow
@pytest.mark.fresh
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("parent", FAMILIES, indirect=True)
def test_a_recovery_that_ran_is_exported_by_a_fresh_process(
    parent: str, scope: str, tmp_path: Path, corpus_file: str
) -> None:
    """The whole way by the command line, training included."""
    given = {
        "model.init_args.mask": tmp_path / "mask.json", "model.init_args.scope": scope,
        "model.init_args.lora_rank": 2, "data.init_args.train": corpus_file,
        "data.init_args.validation": corpus_file, "data.init_args.batch_size": 4, "trainer.max_steps": 3,
        "trainer.limit_val_batches": 0, "trainer.accelerator": "cpu",
        "trainer.logger.init_args.save_dir": tmp_path, "trainer.logger.init_args.version": "run",
        "trainer.enable_progress_bar": "true",
    }  # fmt: skip
    main(["fit", "--config", "configs/recover/entropy_kd.yaml"] + [f"--{k}={v}" for k, v in given.items()])
    checkpoint = tmp_path / "recover" / "run" / "checkpoints" / "last.ckpt"
    out = tmp_path / "out"
    main(
        ["export", "--mask", str(tmp_path / "mask.json"), "--checkpoint", str(checkpoint), "--out", str(out)]
    )
    assert f"({scope})" in exported(out)


@pytest.mark.parametrize(
    ("family", "left"),
    [
        ("llama", ""),
        ("mixtral", ""),
        ("gpt_oss", "mlp.experts.down_proj, mlp.experts.down_proj_bias, mlp.experts.gate_up_proj"),
        ("qwen3_moe", "mlp.down_proj, mlp.gate_proj, mlp.up_proj"),  # of its dense layers
    ],
)
def test_adapters_say_which_weights_they_do_not_reach(family: str, left: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapters = adapted(tiny_model(family), 2)
    found = out_of_reach(adapters)
    assert found.startswith(left)
    assert bool(found) == bool(left)
    assert any("do not reach" in str(w.message) for w in caught) == bool(left)
    trained = {name for name, p in adapters.named_parameters() if p.requires_grad}
    for name in found.split(" (")[0].split(", ") if found else ():
        assert not any(re.search(rf"\.\d+\.{re.escape(name)}\.", each) for each in trained)
