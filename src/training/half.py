"""Keep noise and gates in float32 if a trainer runs in half precision, and say in which type weights load.

*True half* precision is that of ``precision: bf16-true`` or ``16-true``, under which Lightning makes every
new tensor half.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning import LightningModule

from src.models.loading import Dtype

_TYPES: dict[str, Dtype] = {"bf16-true": "bfloat16", "16-true": "float16"}


def true_half(module: LightningModule) -> Dtype | None:
    """Return the type of the weights if the trainer's precision is true half; None under any other."""
    return None if module._trainer is None else _TYPES.get(module.trainer.precision)


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Make new tensors, such as noise and gates, float32 in the block, whatever the trainer's precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
