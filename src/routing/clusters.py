"""Few masks for many prompts: k legal masks, and for each prompt the one that suits it best.

A prompt with logits z is worth ``z . m`` under a mask m; its own mask is the best legal one. The masks
maximise the sum over the prompts, by Lloyd's two steps: each prompt goes to its best mask, and each mask
becomes the best legal one for the sum of its prompts' logits. Neither step lowers the sum, so they end. As
many masks as there are different ones give each prompt its own.

Shapes: P prompts, U units, K masks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from src.errors import ConfigError
from src.units.spaces import Space


@dataclass(frozen=True)
class Clusters:
    """Masks, and which of them each prompt has.

    Attributes:
        masks_KU: ones and zeros, each a legal set.
        of_P: the number of each prompt's mask.
        worth: the sum over the prompts of ``z . m``.
    """

    masks_KU: Tensor
    of_P: Tensor
    worth: float


def clusters(scores_PU: Tensor, space: Space, k: int) -> Clusters:
    """Return k masks for prompts of the given logits.

    The first mask is the best one for all prompts. Each further one begins as the own mask of the prompt that
    loses most under those before it, and all are then improved.

    Args:
        scores_PU: the prompts' logits.
        space: legal masks.
        k: number of masks.

    Raises:
        ConfigError: the prompts have fewer different masks than ``k``.
    """
    scores_PU = scores_PU.double().cpu()
    own_PU = space.argmax(scores_PU)
    masks_KU = space.argmax(scores_PU.sum(0))[None]
    while True:
        masks_KU, of_P = _lloyd(scores_PU, masks_KU, space)
        if len(masks_KU) == k:
            return Clusters(masks_KU, of_P, float((scores_PU * masks_KU[of_P]).sum()))
        regret_P = (scores_PU * (own_PU - masks_KU[of_P])).sum(1)
        if regret_P.max() <= 0:
            raise ConfigError(
                f"--clusters: {k} given, but {len(own_PU)} calibration prompts have {len(masks_KU)} "
                f"different masks. Accepted: 1 to {len(masks_KU)}. If that is few, the masks have collapsed "
                "to one: train longer, with a higher rate or text of more kinds."
            )
        masks_KU = torch.cat([masks_KU, own_PU[regret_P.argmax()][None]])


def _lloyd(scores_PU: Tensor, masks_KU: Tensor, space: Space) -> tuple[Tensor, Tensor]:
    """Improve masks until none changes; return those that some prompt has, and each prompt's number."""
    while True:
        _, of_P = torch.unique((scores_PU @ masks_KU.T).argmax(1), return_inverse=True)
        sums_KU = scores_PU.new_zeros(int(of_P.max()) + 1, scores_PU.shape[1]).index_add_(0, of_P, scores_PU)
        better_KU = space.argmax(sums_KU)
        if better_KU.shape == masks_KU.shape and torch.equal(better_KU, masks_KU):
            return masks_KU, of_P
        masks_KU = better_KU


def mean_jaccard(masks_PU: Tensor) -> float:
    """Return the mean Jaccard index of the kept units of two different prompts; 1 if all masks are equal.

    Args:
        masks_PU: ones and zeros; of one prompt alone the index is 1.
    """
    kept_PU = masks_PU.float()
    both_PP = kept_PU @ kept_PU.T
    count_P = kept_PU.sum(1)
    index_PP = both_PP / (count_P[:, None] + count_P - both_PP)
    pairs = len(masks_PU) * (len(masks_PU) - 1)
    return float((index_PP.sum() - index_PP.trace()) / pairs) if pairs else 1.0
