"""Divide logits into blocks of rows that stay in a processor's cache.

A tensor ``[N, V]`` of a large vocabulary is hundreds of megabytes, and each operation on all of it goes
through main memory. A few rows at a time take a third of the time, and give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CACHED = 1 << 17
"""Number of logits that a thread of a processor handles at a time: 512 KiB of float32."""


def blocks(*tensors_nV: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the rows of tensors a few at a time, so that what is done to them stays in a processor's cache.

    On other devices the rows come all at once.
    """
    n, vocabulary = tensors_nV[0].shape
    on_cpu = tensors_nV[0].device.type == "cpu"
    threads = torch.get_num_threads()  # which divide the rows among them: none shall be idle
    rows = max(threads, CACHED * threads // vocabulary) if on_cpu else n
    return zip(*(x_nV.split(max(1, rows)) for x_nV in tensors_nV), strict=True)
