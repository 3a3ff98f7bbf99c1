"""LinearPatch through the product: exported, recovered from, composed, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from src import cli
from src.errors import ConfigError
from src.mask import Mask
from src.models.cut import cut
from src.models.loading import load_model, load_tokenizer
from src.recover import Recovery
from src.repair import verb
from src.repair.linear_patch import LinearPatch
from src.training.scopes import load_student


@pytest.fixture
def folded(mask_file: str, corpus_file: str) -> PreTrainedModel:
    """The cut model of ``mask_file`` as :class:`LinearPatch` leaves it."""
    mask = Mask.load(mask_file)
    parent = load_model(mask.model)
    student = cut(parent, mask)
    repairs = LinearPatch(corpus_file, device="cpu")(student, parent, mask, load_tokenizer(mask.model))
    assert [r.module for r in repairs] == ["model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj"]
    assert all(0 < r.after < r.before for r in repairs)
    return student


def test_the_exported_directory_is_the_folded_model(
    folded: PreTrainedModel, mask_file: str, corpus_file: str, tmp_path: Path
) -> None:
    out, mask = tmp_path / "out", Mask.load(mask_file)
    verb.main(["--mask", mask_file, "--data", corpus_file, "--out", str(out)])
    loaded = AutoModelForCausalLM.from_pretrained(out).state_dict()
    plain = cut(load_model(mask.model), mask).state_dict()
    changed = {name for name, tensor in loaded.items() if not torch.equal(tensor, plain[name])}
    assert changed == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 2)}
    for name, tensor in folded.state_dict().items():
        assert torch.equal(tensor, loaded[name])
    card = (out / "README.md").read_text()
    assert "fitted to the parent's stream on 40 rows" in card
    assert "parent's weights, but for the repair" in card
    assert json.loads((out / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]


@pytest.mark.parametrize("scope", ["full", "cut_adjacent", "lora"])
def test_a_recovery_starts_from_the_folded_model(
    scope: Any, folded: PreTrainedModel, mask_file: str, corpus_file: str, tmp_path: Path
) -> None:
    mask, ids = Mask.load(mask_file), torch.arange(3, 23)[None]
    parent = load_model(mask.model)
    made = Recovery(mask_file, patch=LinearPatch(corpus_file, device="cpu"), scope=scope)
    made.configure_model()
    assert made.read.documents == 40  # its rows are text that the recovery needs
    with torch.no_grad():
        expected, plain = folded(ids).logits, cut(parent, mask)(ids).logits
        assert torch.equal(made.model.eval()(ids).logits, expected)
        assert torch.equal(made.teacher._model[0](ids).logits, parent(ids).logits)  # the teacher is whole
    assert not torch.allclose(expected, plain, atol=1e-2)
    saved = {"state_dict": made.state_dict()}
    made.on_save_checkpoint(saved)
    assert "fitted to the parent's stream" in saved["recovery"]["patch"]
    torch.save(saved, tmp_path / "student.ckpt")
    with torch.no_grad():
        back = load_student(parent, mask, str(tmp_path / "student.ckpt"))(ids).logits
    torch.testing.assert_close(back, expected, rtol=1e-5, atol=1e-5)


def test_a_mask_without_an_inner_gap_records_no_repair(
    teacher_dir: str, corpus_file: str, tmp_path: Path
) -> None:
    mask, out = tmp_path / "tail.json", tmp_path / "out"
    Mask(model=teacher_dir, num_layers=6, keep=(0, 1, 2, 3), method="tail").save(mask)
    with pytest.warns(UserWarning, match="nothing is repaired"):
        verb.main(["--mask", str(mask), "--data", corpus_file, "--out", str(out)])
    card = (out / "README.md").read_text()
    assert not any(word in card for word in ("| Repair |", "but for the repair", "calibration", "fitted"))
    made = Recovery(str(mask), patch=LinearPatch(corpus_file, device="cpu"))
    with pytest.warns(UserWarning, match="nothing is repaired"):
        made.configure_model()
    saved: dict[str, Any] = {}
    made.on_save_checkpoint(saved)
    assert saved["recovery"]["patch"] is None


@pytest.mark.parametrize(("train", "rows"), [("{}", 40), ("[{{path: {}, rows: 3}}]", 3)])
def test_the_overlay_runs_on_rows_that_train(
    mask_file: str, corpus_file: str, tmp_path: Path, train: str, rows: int
) -> None:
    arguments = {
        "model.init_args.mask": mask_file, "data.init_args.train": train.format(corpus_file),
        "data.init_args.validation": corpus_file,
        "data.init_args.batch_size": 4, "trainer.max_steps": 1, "trainer.limit_val_batches": 0,
        "trainer.accelerator": "cpu", "trainer.logger.init_args.save_dir": tmp_path,
    }  # fmt: skip
    configs = ["configs/recover/entropy_kd.yaml", "configs/recover/linear_patch.yaml"]
    given = [f"--config={path}" for path in configs] + [f"--{k}={v}" for k, v in arguments.items()]
    repair = cli.run(["fit", *given]).model.patch
    assert len(repair.repairs) == 2
    assert repair.data == corpus_file
    assert repair.read.documents == rows, "a budget of text is not exceeded"


@pytest.mark.slow
@pytest.mark.parametrize("overlay", ["linear_patch", "mask_tuning"])
def test_a_recovery_from_a_repair_is_exported_and_proven(
    overlay: str, mask_file: str, corpus_file: str, tmp_path: Path
) -> None:
    """The directory holds the trained weights to the last bit, and its card both repair and recovery."""
    arguments = {
        "model.init_args.mask": mask_file, "data.init_args.train": corpus_file,
        "data.init_args.batch_size": 4, "trainer.max_steps": 2, "trainer.limit_val_batches": 0,
        "trainer.accelerator": "cpu", "trainer.logger.init_args.save_dir": tmp_path,
    }  # fmt: skip
    configs = ["configs/recover/entropy_kd.yaml", f"configs/recover/{overlay}.yaml"]
    given = [f"--config={path}" for path in configs] + [f"--{k}={v}" for k, v in arguments.items()]
    trained, out = cli.run(["fit", *given]).model, tmp_path / "out"
    saved = next(tmp_path.rglob("last.ckpt"))
    cli.main(["export", "--mask", mask_file, "--checkpoint", str(saved), "--out", str(out)])
    back, own = AutoModelForCausalLM.from_pretrained(out).state_dict(), trained.model.state_dict()
    assert back.keys() == own.keys()
    assert all(torch.equal(weight, own[name]) for name, weight in back.items())
    card = (out / "README.md").read_text()
    assert f"| Repair | {trained.patch} |" in card
    assert "| Recovery | distilled from the parent on " in card
    assert "| logits = original | equal to the last bit |" in card


def test_without_rows_of_its_own_or_text_to_take_them_from_a_repair_is_refused(teacher_dir: str) -> None:
    with pytest.raises(ConfigError, match=r"patch.data: null given.*patch.init_args.data"):
        LinearPatch(None, device="cpu").calibration(load_tokenizer(teacher_dir))


def test_a_gap_at_the_end_is_left_alone_with_a_warning(teacher_dir: str, corpus_file: str) -> None:
    mask = Mask(teacher_dir, 6, (0, 1, 2, 3), "test")
    parent = load_model(teacher_dir)
    student = cut(parent, mask)
    with pytest.warns(UserWarning, match="no gap between two kept layers"):
        assert not LinearPatch(corpus_file)(student, parent, mask, load_tokenizer(teacher_dir))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--goal", "rotated"), "'rotated' given; accepted: "),
        (("--distill-steps", "5"), r"no P to distil.*'rotate' or 'diag'"),
        (("--ridge", "-1"), "--ridge: '-1' given; accepted: a number from 0"),
        (("--text", "body"), "lacks 'body'"),
    ],
)
def test_bad_input_gives_one_message(
    more: tuple[str, ...], message: str, mask_file: str, corpus_file: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        verb.main(["--mask", mask_file, "--data", corpus_file, "--out", str(tmp_path / "out"), *more])
    assert not (tmp_path / "out").exists()
