"""Remove the deepest layers, a rule that needs no data (arXiv 2411.15558; arXiv 2403.17887)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from src.policies.measuring import Probe
from src.policies.one_shot import OneShot


class Tail(OneShot):
    """Removes the last n layers, of those that may be removed.

    Args:
        keep_last: keep the very last layer, and remove the n before it (UIDL's simple heuristic).
        always_keep: layers that may not be removed, such as ``[0, -1]``; negative counts from the end.
        kwargs: ``seed``, ``candidates``, ``polish`` of the base class.
    """

    any_count = True

    def __init__(self, keep_last: bool = False, always_keep: Iterable[int] = (), **kwargs: Any) -> None:
        super().__init__(always_keep=[*always_keep, *([-1] if keep_last else [])], **kwargs)

    def score(self, probe: Probe) -> Tensor:
        return -torch.arange(self.num_layers, dtype=torch.float32)
