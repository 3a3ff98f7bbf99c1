"""Remove the run of layers with the least angular distance (UIDL, arXiv 2403.17887)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from src.policies.one_shot import Contiguous


class AngularDistance(Contiguous):
    """Removes the n neighbouring layers that turn the residual stream least at each row's last token.

    The turn is the angle ``arccos cos(h_l, h_{l+n}) / pi``, in the mean over rows. It takes one forward pass.
    In packed rows the last token is that of the last document.
    """

    def change(self, h_in_WBTH: Tensor, h_out_WBTH: Tensor, real_BT: Tensor) -> Tensor:
        rows_B, back_B = torch.arange(len(real_BT)), real_BT.flip(1).int().argmax(1)
        last_B = real_BT.shape[1] - 1 - back_B
        u_WBH = normalize(h_in_WBTH[:, rows_B, last_B].float(), dim=-1)
        v_WBH = normalize(h_out_WBTH[:, rows_B, last_B].float(), dim=-1)
        # The same angle as arccos of the cosine, which loses half its digits at small angles.
        return 2 / math.pi * torch.atan2((u_WBH - v_WBH).norm(dim=-1), (u_WBH + v_WBH).norm(dim=-1))
