"""Hidden-state distillation: each kept layer learns to give the stream that its successor was trained on.

In the student, layer j + 1 reads what layer j gives. In the parent, the same layer reads the stream behind
the gap, that is behind the layers that were removed between the two. That stream of the parent is the target
of layer j. The target of the last layer is what the parent's final norm reads.

    loss = sum over layers j of  mean over positions of  |s_j - t_j|^2 / |t_j|^2

Here s is the student's stream and t the parent's. The error is relative at each position, for two reasons. A
stream grows with depth; and at a few positions (attention sinks) it is a hundred times larger than at others.
Divided by a mean over the batch, these positions would dominate the loss, and micro-batches would change it.
With ``error: direction`` both are first brought to length 1, since what a layer reads is normalised, and
lengths do not count: |s/|s| - t/|t||^2, twice one minus the cosine.

The error may be *local*: its gradient ends where a layer begins, so that each layer learns its own target
from the stream that it is given, and no pass runs back through the model. Nothing needs logits then, and a
frozen layer keeps nothing for the backward pass. For masks of width such reconstruction needs little memory
and few rows (arXiv 2510.14444). Here each layer reads the student's own stream, not the parent's, and so
repairs what those before it have left.

The term reads inner layers of the parent, so the teacher must run live. It holds ``[N, H]`` for each layer.
TinyBERT (arXiv 1909.10351) and Minitron (arXiv 2407.14679) compare a pruned student's layers with the
parent's, too. The target behind the gap and the relative error are ours.

Shapes: N supervised positions, H hidden.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from src.errors import ConfigError
from src.losses.terms import Pair, Step, Term
from src.mask import Mask


class HiddenStates(Term):
    """Computes the relative squared error of the kept layers' outputs, summed over layers; logs ``states``.

    Args:
        layers: kept layers that are compared: ``all``; ``gaps``, those right before a gap; or a list of their
            numbers in the parent, where a negative number counts from the parent's end.
        local: whether each of them is trained by its own error alone. What is not compared is then frozen,
            and no other term has a part in the loss.
        error: ``relative`` or ``direction``, as above.
    """

    def __init__(
        self,
        layers: Literal["all", "gaps"] | list[int] = "all",
        local: bool = False,
        error: Literal["relative", "direction"] = "relative",
    ) -> None:
        self.layers, self.local, self.error = layers, local, error

    def pairs(self, mask: Mask) -> tuple[Pair, ...]:
        kept = mask.feed_forward  # what leaves a layer is written by its feed-forward
        every = {layer: (j, mask.reads[j] - 1) for j, layer in enumerate(kept)}
        if self.layers == "all":
            chosen = list(kept)
        elif self.layers == "gaps":
            chosen = [layer for layer, (_, target) in every.items() if target != layer]
        else:
            chosen = [layer + mask.num_layers * (layer < 0) for layer in self.layers]
        if not chosen or not set(chosen) <= set(kept):
            raise ConfigError(
                f"terms: HiddenStates.layers: {self.layers} given, which are not layers that the mask keeps. "
                f"Accepted: all, gaps (layers before a gap), or some of {list(kept)}."
            )
        return tuple(every[layer] for layer in sorted(set(chosen)))

    def loss(self, step: Step) -> dict[str, Tensor]:
        pairs = self.pairs(step.mask)
        measure = relative_error if self.error == "relative" else direction_error
        errors = [measure(step.student[own], step.parent[theirs]) for own, theirs in pairs]
        value = torch.stack(errors).sum() / step.count
        return {"loss": value, "states": value.detach()}


def relative_error(own_NH: Tensor, target_NH: Tensor) -> Tensor:
    """Return the sum over N positions of ``|own - target|^2 / |target|^2``, a float32 scalar."""
    target = target_NH.float()
    size_N = target.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((own_NH.float() - target).square().sum(-1) / size_N).sum()


def direction_error(own_NH: Tensor, target_NH: Tensor) -> Tensor:
    """Return the sum over N positions of ``|own / |own| - target / |target||^2``, a float32 scalar."""
    return 2 * (1 - F.cosine_similarity(own_NH.float(), target_NH.float(), dim=-1)).sum()
