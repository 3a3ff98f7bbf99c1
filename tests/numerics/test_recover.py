"""Laws of the recovery: what trains, what is saved, and that what is saved comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from src.cli import run
from src.errors import ConfigError
from src.mask import Mask
from src.models.layers import decoder_layers
from src.models.loading import load_model
from src.recover import Recovery
from src.teachers import LiveTeacher
from src.training.scopes import cut_adjacent, load_student


@pytest.mark.parametrize(
    ("layers", "keep", "near"),
    [
        (6, (0, 2, 3, 5), {0, 1, 2, 3}),  # cuts between 0|2 and 3|5
        (6, (0, 1, 4, 5), {1, 2}),
        (6, (2, 3, 4, 5), {0}),  # cut before the first
        (6, (0, 1, 2, 3), {3}),  # tail cut
        (8, (0, 1, 2, 5, 6, 7), {2, 3}),
    ],
)
def test_blocks_next_to_the_cuts(layers: int, keep: tuple[int, ...], near: set[int]) -> None:
    assert cut_adjacent(Mask(model="m", num_layers=layers, keep=keep, method="x")) == near


def test_only_the_blocks_next_to_the_cut_train(teacher_dir: str, tmp_path: Path) -> None:
    Mask(model=teacher_dir, num_layers=6, keep=(0, 1, 4, 5), method="x").save(tmp_path / "mask.json")
    made = Recovery(str(tmp_path / "mask.json"), scope="cut_adjacent")
    made.configure_model()
    _, layers = decoder_layers(made.model)
    trained = {id(p) for p in made.model.parameters() if p.requires_grad}
    assert trained == {id(p) for i in (1, 2) for p in layers[i].parameters()}


def test_the_parent_teaches_unless_another_form_of_it_is_asked_for(teacher_dir: str, mask_file: str) -> None:
    """Settings of the teacher's weights hold without naming a model: they make a copy of the parent."""
    parent = load_model(teacher_dir)
    teachers = [LiveTeacher(), LiveTeacher(dtype="bfloat16"), LiveTeacher(attention="eager")]
    for teacher in teachers:
        made = Recovery(mask_file, teacher=teacher)
        made.configure_model()
        teacher.adopt(parent)
        teacher.setup(made)
    one, half, eager = (teacher.head.model for teacher in teachers)
    assert one is parent
    assert (half.dtype, half.config._attn_implementation) == (torch.bfloat16, "sdpa")
    assert (eager.dtype, eager.config._attn_implementation) == (torch.float32, "eager")
    theirs = dict(half.named_parameters())
    assert all(torch.equal(theirs[name], weight.bfloat16()) for name, weight in parent.named_parameters())


@pytest.mark.parametrize("scope", ["full", "cut_adjacent", "lora"])
def test_the_checkpoint_comes_back_as_a_plain_model(
    scope: str, tmp_path: Path, teacher_dir: str, corpus_file: str, mask_file: str
) -> None:
    """Recovered logits survive saving and loading; LoRA adapters are merged into plain weights."""
    arguments = {
        "model.init_args.model": teacher_dir, "model.init_args.mask": mask_file,
        "model.init_args.scope": scope, "data.init_args.validation": corpus_file,
        "data.init_args.train": corpus_file, "data.init_args.batch_size": 4, "trainer.max_steps": 3,
        "trainer.limit_val_batches": 0, "trainer.accelerator": "cpu",
        "trainer.logger.init_args.save_dir": tmp_path, "trainer.logger.init_args.version": "run",
    }  # fmt: skip
    done = run(
        ["fit", "--config", "configs/recover/entropy_kd.yaml"] + [f"--{k}={v}" for k, v in arguments.items()]
    )
    trained = done.model.model.eval()
    done.trainer.save_checkpoint(tmp_path / "student.ckpt")
    parent, mask = load_model(teacher_dir), Mask.load(mask_file)
    back = load_student(parent, mask, str(tmp_path / "student.ckpt"))
    ids = torch.arange(3, 23)[None]
    torch.testing.assert_close(back(ids).logits, trained(ids).logits, rtol=1e-4, atol=1e-5)
    assert type(back) is type(parent)
    assert not any("lora" in key for key in back.state_dict())
    fresh = load_student(parent, mask, str(tmp_path / "student.ckpt"))
    assert torch.equal(fresh(ids).logits, back(ids).logits)


def test_a_checkpoint_of_another_mask_is_refused(tmp_path: Path, teacher_dir: str, mask_file: str) -> None:
    made = Recovery(mask_file)
    made.configure_model()
    saved = {"state_dict": made.state_dict()}
    made.on_save_checkpoint(saved)
    torch.save(saved, tmp_path / "student.ckpt")
    load_student(load_model(teacher_dir), Mask.load(mask_file), str(tmp_path / "student.ckpt"))
    for keep in ((0, 5), (0, 2, 3, 4)):  # another depth, and the same depth: shapes alone could not tell
        other = Mask(model=teacher_dir, num_layers=6, keep=keep, method="x")
        with pytest.raises(ConfigError, match="was trained with"):
            load_student(load_model(teacher_dir), other, str(tmp_path / "student.ckpt"))
        other.save(tmp_path / "other.json")
        with pytest.raises(ConfigError, match="was trained with"):
            Recovery(str(tmp_path / "other.json")).on_load_checkpoint(saved)
