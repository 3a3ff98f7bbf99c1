"""Laws of a recovery that starts from an earlier one: the same weights, the same mask, the same parent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from src.errors import ConfigError
from src.mask import Mask
from src.models.cut import cut
from src.models.fingerprint import weights_fingerprint
from src.models.loading import load_model
from src.recover import Recovery
from tests.tiny import problem_rows

KEEP = [0, 2, 3, 5]


@pytest.fixture
def earlier(tmp_path: Path, teacher_dir: str) -> dict[str, Any]:
    """The checkpoint of an earlier recovery, whose weights have moved."""
    torch.manual_seed(3)
    student = cut(load_model(teacher_dir), Mask.by_hand(teacher_dir, 6, KEEP))
    for parameter in student.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return {
        "state_dict": {f"model.{name}": x for name, x in student.state_dict().items()},
        "recovery": {
            "tokens": 12_345, "scope": "full", "rank": 16, "keep": KEEP, "unit": "layer", "patch": None,
        },
        "identity": {"parent": teacher_dir, "weights": weights_fingerprint(teacher_dir)},
    }  # fmt: skip


def saved(content: dict[str, Any], path: Path) -> str:
    torch.save(content, path)
    return str(path)


def test_the_weights_are_those_of_the_earlier_recovery(
    earlier: dict[str, Any], tmp_path: Path, mask_file: str
) -> None:
    """To the last bit, and all of them train; what it started from is noted."""
    made = Recovery(mask_file, patch=saved(earlier, tmp_path / "earlier.ckpt"))
    made.configure_model()
    assert made.state_dict().keys() == earlier["state_dict"].keys()
    assert all(torch.equal(x, earlier["state_dict"][name]) for name, x in made.state_dict().items())
    assert all(p.requires_grad for p in made.model.parameters())
    assert made.model.training
    cold = Recovery(mask_file)
    cold.configure_model()
    ids = problem_rows(2)["input_ids"]
    assert not torch.allclose(made.model(ids).logits, cold.model(ids).logits, rtol=1e-2)


def test_what_it_started_from_is_noted_also_through_several_stages(
    earlier: dict[str, Any], tmp_path: Path, mask_file: str
) -> None:
    noted, content = dict[str, Any](), {**earlier, "recovery": {**earlier["recovery"], "patch": "a repair"}}
    made = Recovery(mask_file, patch=saved(content, tmp_path / "earlier.ckpt"))
    made.configure_model()
    made.on_save_checkpoint(noted)
    assert noted["recovery"]["patch"] == "an earlier recovery on 12,345 tokens (full), after a repair"


REFUSED = {
    "mask": ({"keep": [0, 1, 2, 3]}, {}, "trained with layers \\[0, 1, 2, 3\\]"),
    "parent": ({}, {"parent": "other", "weights": "another"}, "was trained under 'other'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_mask_or_parent_is_refused(
    case: str, earlier: dict[str, Any], tmp_path: Path, mask_file: str
) -> None:
    recovery, identity, told = REFUSED[case]
    if "weights" in identity:  # of the same scheme
        identity = {**identity, "weights": earlier["identity"]["weights"][:-4] + "0000"}
    content = {
        **earlier,
        "recovery": earlier["recovery"] | recovery,
        "identity": earlier["identity"] | identity,
    }
    made = Recovery(mask_file, patch=saved(content, tmp_path / "earlier.ckpt"))
    with pytest.raises(ConfigError, match=told):
        made.configure_model()


@pytest.mark.parametrize(
    ("content", "told"), [(None, "accepted: adapters"), ({"state_dict": {}}, "no checkpoint of a recovery")]
)
def test_what_is_no_recovery_is_refused(
    content: dict[str, Any] | None, told: str, tmp_path: Path, mask_file: str
) -> None:
    path = tmp_path / "earlier.ckpt"
    if content is not None:
        saved(content, path)
    with pytest.raises(ConfigError, match=told):
        Recovery(mask_file, patch=str(path)).configure_model()
