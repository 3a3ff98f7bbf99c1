"""Two ranks of DDP train the weights of one process, whatever parts a recovery has (gloo, CPU, fp32)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.distributed.launch import Bench, diary, drift
from tests.distributed.test_equality import MAX

STEPS, LR = 4, 7e-4
MOST = STEPS * LR * 1e-3
"""Largest difference of a weight.

AdamW divides a gradient by its own size, so an update is off by LR times the gradient's relative error. That
is about 2^-23, as ranks only sum in another order; a thousandth where the terms cancel to 1e-4 of their size.
"""
MEAN = 0.1 * 2**-23
"""Mean difference: a tenth of float32's step from 1 to 2, as nearly all weights are equal to the last bit."""
SETTINGS = "model__init_args__distillation__init_args__"
pytestmark = pytest.mark.slow


def trained(bench: Bench, overlay: str, ranks: int, name: str, **keys: Any) -> tuple[Path, list[Tensor]]:
    """Recover; return the directory of the run, and all trained weights of each rank as one vector."""
    weights = f"tests.distributed.rows.Weights={{directory: {bench.out / name}}}"
    keys = {"trainer__max_steps": STEPS, **keys, "callbacks": [*keys.pop("callbacks", []), weights]}
    run = bench.fit(name, "recover", overlay, ranks, **keys)
    each = [load_file(run / f"{rank}.safetensors") for rank in range(ranks)]
    return run, [torch.cat([own[name].flatten() for name in sorted(own)]) for own in each]


STREAMS = {"term": {"class_path": "src.losses.HiddenStates"}, "weight": 10.0, "until": 0.5}
CASES = "a repair, the tail and the reverse", "an earlier recovery", "streams for half of it, averaged"


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_the_weights_of_one_process(case: str, bench: Bench, record_property: Any) -> None:
    plain, (without,) = trained(bench, "single", 1, "plain")
    keys: dict[str, Any] = {"model__init_args__patch": next(plain.rglob("last.ckpt"))}
    if case == CASES[2]:
        averaged = "src.callbacks.AveragedWeights={decay: 0.5}"
        keys = {"model__init_args__terms": [STREAMS], "callbacks": [averaged]}
    if case == CASES[0]:
        rows = {"data": bench.corpus, "rows": 8}
        keys = {"model__init_args__patch": {"class_path": "src.linear_patch.LinearPatch", "init_args": rows}}
        keys |= {SETTINGS + "tail": 2.0, SETTINGS + "reverse_below": 4.18}  # half of the teacher's tokens
    alone, (one,) = trained(bench, "single", 1, "alone", **keys)
    pair, (first, second) = trained(bench, "ddp", 2, "pair", **keys)
    assert drift(diary(alone), diary(pair), "loss")[0] <= MAX
    assert torch.equal(first, second), "ranks make the same update, to the last bit"
    gaps = (first - one).abs()
    record_property(case, f"max {gaps.max():.1e} mean {gaps.mean():.1e}")
    assert gaps.max() <= MOST
    assert gaps.mean() <= MEAN
    assert (one - without).abs().mean() > LR / 10, "parts that did nothing would agree as well"
