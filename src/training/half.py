"""Keep noise and gates in float32 under a trainer of true half precision, and load weights in its type."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning import LightningModule

from src.models.loading import Dtype

_TYPES: dict[str, Dtype] = {"bf16-true": "bfloat16", "16-true": "float16"}


def true_half(module: LightningModule) -> Dtype | None:
    """Return the weights' type under a trainer of true half precision; None under any other."""
    return None if module._trainer is None else _TYPES.get(module.trainer.precision)


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Noise and gates in float32, where a trainer of true half precision would make all new tensors half."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
