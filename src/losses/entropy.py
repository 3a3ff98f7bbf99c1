"""Token weights from the teacher's entropy: uncertain tokens, where a chain of reasoning turns, count more.

With ``u = H / log V`` in [0, 1], before normalising to mean 1:

======== ============================ =====================================================
linear   1 + lambda u                 bounded; lambda = 0 is ``none``
ratio    u                            easy tokens vanish
eakd     u_T (1 + u_S) / 2            teacher and student (EA-KD, arXiv 2311.13621, at T = 1)
topq     1 on the 20 % most uncertain drops the others (arXiv 2506.01939)
none     1                            control
======== ============================ =====================================================
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from src.errors import ConfigError, did_you_mean
from src.training.ranks import WholeBatch

Weight = Literal["linear", "ratio", "eakd", "topq", "none"]
TOP = 0.2


def check_weight(name: str) -> None:
    """Refuse an unknown weight.

    Raises:
        ConfigError: names the accepted ones.
    """
    if name not in get_args(Weight):
        accepted = ", ".join(get_args(Weight))
        raise ConfigError(f"weight: '{name}' is none of {accepted}.{did_you_mean(name, get_args(Weight))}")


def token_weights(
    name: Weight,
    teacher_N: Tensor,
    vocabulary: int,
    strength: float = 1.0,
    student_N: Tensor | None = None,
    mean_entropy: float | None = None,
    whole: WholeBatch | None = None,
) -> Tensor:
    """Weights ``[N]`` with mean 1, without gradient.

    Args:
        name: a row of the table above.
        teacher_N: entropies of the teacher, nats.
        vocabulary: size of the vocabulary; ``log`` of it is the largest entropy.
        strength: lambda of ``linear``.
        student_N: entropies of the student, for ``eakd``.
        mean_entropy: mean entropy of the whole corpus. With it ``linear`` and ``ratio`` are normalised
            alike in every batch and micro-batch; without it, each batch has mean 1.
        whole: the batch that these entropies are a part of, if ranks share one.
    """
    u = teacher_N.detach().float() / math.log(vocabulary)
    if name == "none" or not (len(u) if whole is None else whole.share):
        return torch.ones_like(u)
    if name == "topq":
        w = (u >= (u if whole is None else whole.gather(u)).quantile(1 - TOP)).float()
    elif name == "eakd":
        assert student_N is not None, "eakd needs the student's entropy"
        w = u * (1 + student_N / math.log(vocabulary)) / 2
    elif mean_entropy is not None:
        mean = mean_entropy / math.log(vocabulary)
        return (1 + strength * u) / (1 + strength * mean) if name == "linear" else u / mean
    else:
        w = 1 + strength * u if name == "linear" else u
    return w / (w.mean() if whole is None else whole.mean(w)).clamp_min(1e-12)
