"""Name the operations in which PyTorch runs scaled dot-product attention, and count their work."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

FORWARD = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_efficient_attention,
    torch.ops.aten._scaled_dot_product_cudnn_attention,
)
"""The fused kernels; torch counts those of GPUs, not of CPUs, and in some versions no grouped queries."""
CPU, CPU_BACKWARD = FORWARD[0], torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> int:
    """Return the floating-point operations of attention on a query, a key and a value of these shapes.

    They are those of its two matrix products; nothing is saved for a causal mask.

    Args:
        query: such as ``[B, heads, T, width of a head]``.
        key: the same for the tokens that are attended to; its heads are not counted.
        value: as ``key``, with a width of its own.
    """
    *batch, queries, width = query
    return 2 * math.prod(batch) * queries * key[-2] * (width + value[-1])
