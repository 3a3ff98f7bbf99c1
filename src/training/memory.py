"""The memory that this process has held."""

from __future__ import annotations

import resource

import torch


def peak(device: torch.device) -> int:
    """Return the most bytes that this process has held: on a GPU of its tensors, otherwise in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
