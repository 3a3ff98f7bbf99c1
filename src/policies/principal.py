"""Regression on a few principal directions: as many as predict left-out rows best, and none if none does.

What rows differ in most is often their kind, and a regression on that direction alone does not shrink what it
finds, as a ridge would. A row's error, had it been left out of a fit on given directions, is its own error
over ``1 - leverage`` (Allen 1974, PRESS), so nothing is fitted again.

Shapes: P rows, D inputs, U outputs, R = min(P, D) directions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def regression(read_PD: Tensor, own_PU: Tensor) -> Tensor:
    """Return the weights ``[D, U]`` that predict ``own - mean`` from ``read``.

    At most as many directions are tried as half of the rows.

    Args:
        read_PD: inputs, centred.
        own_PU: outputs.
    """
    left_PR, sizes_R, right_RD = (x.to(own_PU) for x in torch.linalg.svd(read_PD.double(), False))
    told_PU = own_PU - own_PU.mean(0)
    turned_RU = left_PR.T @ told_PU
    known = min(int((sizes_R > 1e-6 * sizes_R[0]).sum()), len(own_PU) // 2)
    rest_PU, spare_P, left_out = told_PU, 1 - torch.full_like(left_PR[:, 0], 1 / len(own_PU)), list[float]()
    for count in range(known + 1):
        left_out.append(float((rest_PU.square().sum(1) / spare_P.square()).sum()))
        rest_PU = rest_PU - left_PR[:, count : count + 1] @ turned_RU[count : count + 1]
        spare_P = spare_P - left_PR[:, count : count + 1].square().sum(1)
    best = left_out.index(min(left_out))
    out: Tensor = (right_RD[:best].T / sizes_R[:best]) @ turned_RU[:best]
    return out
