"""LLM-Streamline's choice of layers (arXiv 2403.19135): remove the run that turns the stream least.

LLM-Streamline then trains a small network in the place of the run; this policy only chooses.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity

from src.policies.one_shot import Contiguous


class Streamline(Contiguous):
    """Removes the run of layers with the greatest mean ``cos(h_l, h_{l+n})`` over the real tokens."""

    def change(self, h_in_WBTH: Tensor, h_out_WBTH: Tensor, real_BT: Tensor) -> Tensor:
        return 1 - cosine_similarity(h_in_WBTH[:, real_BT].float(), h_out_WBTH[:, real_BT].float(), dim=-1)
