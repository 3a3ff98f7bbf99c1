"""The density of activations as a term: feed-forwards learn to say nothing where nothing needs to be said.

DEFT (arXiv 2402.01911) adds to the loss of a task, of which adapters train, a smooth count of the entries of
the feed-forwards' activations ``a`` that are not zero:

    loss = mean over layers of  mean over positions and channels of  a^2 / (a^2 + eps)

The paper's are the sum, its mean over layers and the weight 1. Ours are three things:

* ``eps``. An entry's gradient is ``2 a eps / (a^2 + eps)^2``. It is greatest at ``sqrt(eps / 3)`` and
  vanishes far above. With 1e-7, as in the paper's code, entries of usual size hardly move.
* what is counted: the input of the linear map that writes to the stream. Without a gate this is the output of
  the activation function, as in the paper. With one (SwiGLU) it is the product, whose zeros spare that map.
* the mean is over supervised positions, as that of every term.

SiLU and GELU give no exact zeros, so ``active`` counts the entries above a threshold in size. Fewer active
entries are no speed by themselves: the export is an ordinary dense model. ADA-DEFT, which also drops
feed-forwards, is :class:`src.training.weighed.Weighed`.

Shapes: N supervised positions, F channels of a feed-forward.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from src.losses.terms import Step, Term
from src.ranges import NonNegative, Positive, checked


class Density(Term):
    """Computes the smooth share of nonzero activations in the feed-forwards of the student.

    Logs it as ``density``, and the share of entries larger than a threshold in size as ``active``.

    Args:
        eps: square of the size at which an entry counts half.
        threshold: size above which an entry counts as active.
    """

    activations = True

    @checked
    def __init__(self, eps: Positive = 1e-2, threshold: NonNegative = 1e-2) -> None:
        self.eps, self.threshold = eps, threshold

    def loss(self, step: Step) -> dict[str, Tensor]:
        layers = list(step.activations.values())
        # Recomputed in the backward pass, so that the activations alone are held.
        soft = [checkpoint(smooth_count, a_NF, self.eps, use_reentrant=False) for a_NF in layers]
        value = torch.stack(soft).mean() / step.count
        with torch.no_grad():
            hard = [(a_NF.abs() > self.threshold).float().mean(-1).sum() for a_NF in layers]
            active = torch.stack(hard).mean() / step.count
        return {"loss": value, "density": value.detach(), "active": active}


def smooth_count(a_NF: Tensor, eps: float) -> Tensor:
    """Return the sum over N positions of the mean over F channels of ``a^2 / (a^2 + eps)``, in float32."""
    square = a_NF.float().square()
    return (square / (square + eps)).mean(-1).sum()
