"""Fast post-training pruning: remove the units of least Fisher information (Kwon et al., arXiv 2204.09656).

At the open gates of a trained model the mean gradient of the loss is near zero. So to second order a mask
with removed units R raises the loss by half the sum over R x R of the Hessian, for which the empirical Fisher
information stands, ``F = sum_b g_b g_b^T`` over batches b of the gates' gradients ``g_b``. Hence

    cost(R)  =  sum over b of (sum over R of g_bi)^2.

*The paper's*: the diagonal of F as score, ``I_i = sum_b g_bi^2``; the rearrangement within a layer, its
counts fixed. It chooses heads and neurons, and how many of each every layer keeps, by their operations.
*Ours*: any kind of unit, as many from each layer where parts of its width go; the cost of whole layers and
of halves with the terms between all of them, and exchanges until none helps.

Shapes: B batches, U units, G groups of W units, R removed in each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from src.policies.measuring import Probe
from src.policies.one_shot import OneShot
from src.policies.scores import finite_gradients
from src.units.spaces import Kept, Space


class Fisher(OneShot):
    """Scores a unit by the sum over batches of its gate's squared gradient; one backward pass scores all.

    The loss is the cross-entropy on the labels, since the divergence from the teacher has no gradient at open
    gates. The legal set of the highest scores is exact for the diagonal of F.

    Args:
        rearranged: let the terms off the diagonal decide too: among units of one layer where each layer is
            chosen apart (KV groups, channels), else among all units.
        kwargs: ``always_keep``, ``seed``, ``candidates``, ``polish`` of the base class.
    """

    works_on = ("layer", "half", "kv_group", "channel")

    def __init__(self, rearranged: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rearranged = rearranged
        self.any_count = not rearranged
        """A rearranged set is of one count: it is no ranking of the units."""

    def score(self, probe: Probe) -> Tensor:
        """Return ``I_i / sum of I`` ``[U]``; if rearranged, 2 more for each unit that is kept."""
        grads_BU = finite_gradients(probe).cpu()
        information_U = grads_BU.square().sum(0)
        share_U = information_U / information_U.sum().clamp_min(torch.finfo(information_U.dtype).tiny)
        if not self.rearranged:
            return share_U
        if (groups := self.space.groups) > 1:
            kept_U = rearranged(grads_BU.unflatten(1, (groups, -1)), self.closed // groups)
        else:
            best = self.space.argmax(information_U).nonzero().flatten().tolist()
            kept_U = self.gates(exchanged(grads_BU, self.space, tuple(best))).cpu()
        return share_U + 2 * kept_U


def cost(grads_BU: Tensor, kept: Kept) -> float:
    """Return the cost of the mask that keeps some units: the squared norm of the removed gradients' sum."""
    gone_U = torch.ones(grads_BU.shape[1], dtype=torch.bool).index_fill(0, torch.tensor(kept), False)
    return float(grads_BU[:, gone_U].sum(1).square().sum())


def exchanged(grads_BU: Tensor, space: Space, kept: Kept) -> Kept:
    """Replace a set by its cheapest neighbour in the space for as long as that lowers its cost.

    Args:
        grads_BU: gradients of the gates.
        space: says which sets are legal, and which are neighbours.
        kept: a legal set.
    """
    least = cost(grads_BU, kept)
    while True:
        best = min(space.neighbours(kept), key=lambda near: cost(grads_BU, near), default=kept)
        if not (found := cost(grads_BU, best)) < least:
            return kept
        kept, least = best, found


def rearranged(grads_BGW: Tensor, remove: int) -> Tensor:
    """Return the units that the paper's rearrangement keeps in each group, as ones and zeros ``[G W]``.

    It begins with the R units of least information as the removed ones. Each other unit, in rising order,
    joins them, and the one leaves them without which their cost is least.

    Args:
        grads_BGW: gradients of the gates.
        remove: number of units to remove from each group, R.
    """
    groups = grads_BGW.shape[1]
    order_GW = grads_BGW.square().sum(0).argsort(stable=True)
    rising_BGW = grads_BGW.gather(2, order_GW.expand_as(grads_BGW))
    gone_GR, gone_BGR = order_GW[:, :remove].clone(), rising_BGW[..., :remove].clone()
    at = torch.arange(groups)
    for unit in range(remove, order_GW.shape[1]):
        # The new one comes first, so of equal costs it is the one that leaves again.
        pool_BGP = torch.cat([rising_BGW[..., unit : unit + 1], gone_BGR], 2)
        left_BGP = pool_BGP.sum(2, keepdim=True) - pool_BGP
        back_G = left_BGP.square().sum(0).argmin(1)
        out_G = (back_G - 1).clamp_min(0)
        stays_G = back_G == 0
        gone_GR[at, out_G] = torch.where(stays_G, gone_GR[at, out_G], order_GW[:, unit])
        gone_BGR[:, at, out_G] = torch.where(stays_G, gone_BGR[:, at, out_G], rising_BGW[..., unit])
    return torch.ones_like(grads_BGW[0]).scatter(1, gone_GR, 0.0).flatten()
