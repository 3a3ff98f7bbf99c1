"""Score tokens, merge them in front of a block, restore them behind it (Prune and Merge, arXiv 2503.23455).

*The paper's*: the score; two thresholds over the tokens of all compressed blocks; a matrix that merges each
token between them into its nearest centre, and its pseudo-inverse, which restores all tokens; a shortcut for
those that are pruned; both matrices are trained.
*Ours*: a row of the merge matrix sums to 1, where the paper's is 1 at its centre: a merged token is a mean.
Nearest is meant on the grid of patches, not along one of its rows.

Shapes: L blocks, B images, A heads, P patches, T = 1 + P tokens (the class token first), C tokens that a
block computes, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTForImageClassification

PRUNED, MERGED, CENTRE = 0, 1, 2
"""The part of a token in a block."""
DECAY = 0.025
"""What a score loses for each block in front of its own, as a share."""


def token_score(attention_BATT: Tensor, gradient_BATT: Tensor) -> Tensor:
    """Return ``|sum of A dLoss/dA|`` ``[P]`` over images, heads and queries, of each patch as a key.

    The sum comes before the absolute value, so signs within a batch cancel.
    """
    return (attention_BATT * gradient_BATT).sum((0, 1, 2))[1:].abs()


def importance(model: ViTForImageClassification, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the score ``[L, P]`` of each patch in each block, comparable between blocks.

    Scores are added up over batches, have norm 1 in each block, and fall with its depth by :data:`DECAY`.

    Args:
        model: a classifier; its weights and their gradients are left as they are.
        batches: images and labels.
    """
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the others keep no attention
    scores = []
    for images, labels in batches:
        out = model(images, labels=labels, output_attentions=True)
        gradients = torch.autograd.grad(out.loss, out.attentions)
        scores.append(torch.stack([*map(token_score, out.attentions, gradients)]).detach())
    model.set_attn_implementation(implementation)
    score_LP = nn.functional.normalize(torch.stack(scores).sum(0), dim=-1)
    return score_LP * (1 - DECAY * torch.arange(len(score_LP)))[:, None]


def parts(score_LP: Tensor, prune: float, keep: float) -> Tensor:
    """Return the part of each patch in each block, ``[L, P]``, by two thresholds over all of them.

    Args:
        score_LP: scores in the compressed blocks.
        prune: share that is pruned: the lowest scores.
        keep: share that are centres: the highest scores. What is between them is merged.
    """
    place = score_LP.flatten().argsort(stable=True).argsort()
    low, high = round(prune * len(place)), len(place) - round(keep * len(place))
    part = torch.full_like(place, MERGED).masked_fill(place < low, PRUNED).masked_fill(place >= high, CENTRE)
    return part.view_as(score_LP)


def nearest(part_P: Tensor, columns: int) -> Tensor:
    """Return the nearest centre of each patch, ``[P]``, the first of several.

    Args:
        part_P: part of each patch.
        columns: patches in a row of the grid.
    """
    patch_P = torch.arange(len(part_P))
    place_P2 = torch.stack([patch_P // columns, patch_P % columns], -1)
    distance_PP = (place_P2[:, None] - place_P2).square().sum(-1).double()
    return distance_PP.masked_fill(part_P != CENTRE, torch.inf).argmin(-1)


def merging(part_P: Tensor, score_P: Tensor, columns: int) -> Tensor:
    """Return the matrix ``[C, T]`` that merges tokens: each row a mean of patches, weighted by their scores.

    The class token has the first row for itself. A pruned patch is in no row, and without a centre none is.

    Args:
        part_P: part of each patch.
        score_P: scores.
        columns: patches in a row of the grid.
    """
    weight_PP = torch.zeros(len(part_P), len(part_P))
    weight_P = score_P.float().clamp_min(torch.finfo().tiny) * (part_P != PRUNED)
    weight_PP[nearest(part_P, columns), torch.arange(len(part_P))] = weight_P
    weight_CP = weight_PP[part_P == CENTRE]
    merge_CT: Tensor = torch.block_diag(torch.ones(1, 1), weight_CP / weight_CP.sum(-1, keepdim=True))
    return merge_CT


def restoring(merge_CT: Tensor) -> Tensor:
    """Return the pseudo-inverse ``[T, C]`` of a merge matrix, which has orthogonal rows."""
    return (merge_CT / merge_CT.square().sum(-1, keepdim=True)).T.contiguous()


class MergedBlock(nn.Module):
    """Computes a block on merged tokens, and a shortcut for the pruned: ``R block(M x) + pruned x``.

    Args:
        block: the block.
        merge_CT: M at the start; R starts as its pseudo-inverse. Both are parameters.
    """

    pruned_T1: Tensor

    def __init__(self, block: nn.Module, merge_CT: Tensor) -> None:
        super().__init__()
        self.block = block
        self.merge_CT = nn.Parameter(merge_CT.clone())
        self.restore_TC = nn.Parameter(restoring(merge_CT))
        self.register_buffer("pruned_T1", (merge_CT == 0).all(0)[:, None].to(merge_CT.dtype))

    def forward(self, hidden_BTH: Tensor, *args: Any, **keys: Any) -> Tensor:
        """Return the stream ``[B, T, H]`` behind the block."""
        computed_BCH: Tensor = self.block(self.merge_CT @ hidden_BTH, *args, **keys)
        return self.restore_TC @ computed_BCH + self.pruned_T1 * hidden_BTH


def compress(model: ViTForImageClassification, merges: Mapping[int, Tensor]) -> ViTForImageClassification:
    """Let blocks of a classifier compute merged tokens, and return it.

    Args:
        model: the classifier, which is changed.
        merges: merge matrix of each block to compress, by its number.
    """
    for layer, merge_CT in merges.items():
        model.vit.layers[layer] = MergedBlock(model.vit.layers[layer], merge_CT)
    return model
