"""ShortGPT (arXiv 2403.03853): remove the layers that change the direction of the residual stream least."""

from __future__ import annotations

from torch import Tensor

from src.policies.measuring import Probe
from src.policies.one_shot import OneShot
from src.policies.scores import block_influence


class BlockInfluence(OneShot):
    """Scores a layer by ``1 - mean cos(h_l, h_{l+1})``: how far it turns the stream, over all real tokens.

    It takes one forward pass.
    """

    any_count = True

    def score(self, probe: Probe) -> Tensor:
        return block_influence(probe, self.num_layers)
