"""A trainer of true half precision: what follows it, and what does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from src.models.loading import Dtype

TRUE_HALF: dict[str, Dtype] = {"bf16-true": "bfloat16", "16-true": "float16"}
"""A trainer's precision that is the type of the weights."""


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Noise and gates in float32, where a trainer of true half precision would make all new tensors half."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
