"""Soft prompts that two ranks distil are those of one process."""

from __future__ import annotations

import pytest
import torch

from src.data.soft import SoftPrompts
from tests.distributed.launch import Bench, diary, drift

pytestmark = pytest.mark.slow


def test_two_ranks_distil_the_prompts_of_one_process(bench: Bench) -> None:
    """The ranks read different rows; windows, stages and steps are those of all rows together."""
    keys = {
        "trainer__max_steps": 5, "model__init_args__prompts": 4, "model__init_args__starts": 2,
        "model__init_args__inner": "{steps: 3, rate: 2.0, window: 2, spread: 1}",
        "model__init_args__validate_every": 2,
    }  # fmt: skip
    runs = [bench.fit(each, "prompts", each, ranks, **keys) for each, ranks in (("single", 1), ("ddp", 2))]
    assert drift(diary(runs[0]), diary(runs[1]), "loss")[0] <= 1e-5
    assert diary(runs[1], 0)[0]["rows"] != diary(runs[1], 1)[0]["rows"]
    one, two = (SoftPrompts.load(next(run.rglob("*.prompts.safetensors")), "it") for run in runs)
    torch.testing.assert_close(two.embeds_MTH, one.embeds_MTH, rtol=0, atol=1e-4)
    assert torch.equal(one.mask_MT, two.mask_MT)
