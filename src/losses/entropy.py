"""Weigh tokens by the teacher's entropy: those about which the teacher is uncertain count more.

H is the entropy of the teacher's distribution, V the size of the vocabulary, and ``u = H / log V`` lies in
[0, 1]. Before they are normalised to mean 1, the weights are:

======== ============================ ================================================================
linear   1 + lambda u                 between 1 and 1 + lambda; lambda = 0 is ``none``
ratio    u                            near zero for tokens about which the teacher is sure
eakd     u (1 + u_S) / 2              u_S is that of the student (EA-KD, arXiv 2311.13621, at T = 1)
topq     1 or 0                       1 for the 20 % of tokens of the highest H (arXiv 2506.01939)
none     1                            the control
======== ============================ ================================================================
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
"""Share of the tokens that ``topq`` keeps."""


def check_weight(name: str) -> None:
    """Refuse an unknown kind of weight.

    Raises:
        ConfigError: the name is unknown; the message lists those that are accepted.
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
    """Return the weights ``[N]`` of N tokens, without gradient.

    Their mean is 1 over the batch. With ``mean_entropy`` the mean of ``linear`` and ``ratio`` is 1 over the
    corpus instead.

    Args:
        name: kind of weight, from the table of this module.
        teacher_N: entropies of the teacher, nats.
        vocabulary: V; no entropy exceeds its logarithm.
        strength: lambda of ``linear``.
        student_N: entropies of the student, nats; ``eakd`` needs them.
        mean_entropy: mean entropy of the teacher over the corpus, nats. It normalises ``linear`` and
            ``ratio`` by the same number in every batch; the other kinds ignore it.
        whole: the batch of all ranks that these tokens are a part of; None if they are the whole batch.
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
