"""A search of prompts on two ranks of DDP (gloo, CPU, fp32)."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.launch import Bench

pytestmark = pytest.mark.slow


def test_a_search_of_prompts_on_two_ranks_makes_the_steps_of_one(bench: Bench) -> None:
    """Each rank's rows have masks of their own, and the predictor learns from the rows of both."""
    routers = []
    for overlay, ranks in (("single", 1), ("ddp", 2)):
        keys = {
            "data": "tests.distributed.rows.GlobalRows", "data.init_args.train": bench.corpus,
            "data.init_args.tokenizer": bench.teacher, "data.init_args.batch_size": 8,
            "model.init_args.model": bench.teacher, "model.init_args.calibration_batches": 2,
            "trainer.max_steps": 8, "trainer.limit_val_batches": 0,
            "trainer.logger.init_args.save_dir": bench.out / overlay,
            "trainer.logger.init_args.version": "run",
        }  # fmt: skip
        verb = [
            "fit",
            "--config",
            "configs/search/gumbel_topk.yaml",
            "--config",
            "configs/search/prompts.yaml",
        ]
        done = bench.command(verb, overlay, ranks, keys)
        assert done.returncode == 0, done.stderr[-3000:]
        routers.append(load_file(next((bench.out / overlay).rglob("router.safetensors"))))
    one, other = routers
    for key in ("table", "weight", "bias"):
        torch.testing.assert_close(other[key], one[key], rtol=0, atol=1e-4 * float(one[key].abs().max()))
    assert one["weight"].abs().max() > 0.1, "a predictor that stands still would agree with anything"
    assert one["prompts"].shape == other["prompts"].shape
