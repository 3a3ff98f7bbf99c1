"""The bases of training-free methods: they score the units once on calibration rows, and learn nothing after.

The scores are in ``logits``, so a checkpoint holds them and a resumed run hardens to the same mask. One
training step is enough (``trainer.max_steps: 1``), because the scores do not change.

Shapes: B batch, T tokens of a row, H hidden, J = L + 1 depths of the residual stream, W = L + 1 - n windows
of n = ``remove`` neighbouring layers, N measured tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor

from src.errors import ConfigError
from src.mask import Unit
from src.policies.base import MaskPolicy
from src.policies.measuring import Probe

BROKEN = 1e30
"""Score of a layer without which the model yields no finite number; finite, so that losses stay finite."""


class OneShot(MaskPolicy):
    """Removes the units of the lowest scores; a subclass computes these.

    Args:
        always_keep: layers that may not be removed, such as ``[0, -1]``; negative counts from the end.
        seed: unused by the scores.
        candidates: leave it at 1: the scores never change, so there is one mask.
        polish: whether single swaps of a removed and a kept layer are tried on held-out rows.
    """

    needs_gradient = False

    @abstractmethod
    def score(self, probe: Probe) -> Tensor:
        """Return scores ``[U]``; the higher, the more a unit matters."""

    def initialise(self, probe: Probe) -> None:
        with torch.no_grad():
            self.logits.copy_(self.score(probe).nan_to_num(nan=BROKEN, posinf=BROKEN))

    def sample(self, step: int, draw: int) -> Tensor:
        """Return the same mask at every draw: gates ``[U]`` of the set of the highest scores."""
        return self.spare(self.remove).argmax(self.logits.detach())

    def surrogate(self, gates_DL: Tensor, losses_D: Tensor, grads_DL: Tensor | None) -> Tensor:
        return self.nothing()


class Contiguous(OneShot):
    """Removes the run of n neighbouring layers (window) that changes the residual stream least.

    Only windows of which every layer may be removed compete. A subclass measures the change.
    """

    def setup(
        self, num_layers: int, remove: int, pinned: Iterable[int] = (), unit: Unit = "layer", width: int = 1
    ) -> None:
        """Set up as the base class does, and find the windows whose layers may all be removed.

        Raises:
            ConfigError: as of the base class, or there is no such window.
        """
        super().setup(num_layers, remove, pinned, unit, width)
        windows = range(num_layers - remove + 1)
        self.starts = [i for i in windows if set(range(i, i + remove)) <= set(self.free)]
        if not self.starts:
            raise ConfigError(
                f"remove: {remove} neighbouring layers asked, but only {self.free} may be removed, and no "
                f"{remove} of them lie side by side. Remove fewer (model.remove, model.ratio), shorten "
                f"policy.always_keep, or choose a policy that may remove scattered layers."
            )

    @abstractmethod
    def change(self, h_in_WBTH: Tensor, h_out_WBTH: Tensor, real_BT: Tensor) -> Tensor:
        """Return how far each window moves the stream ``[W, N]``, at the tokens that the method reads.

        Args:
            h_in_WBTH: the stream in front of each window.
            h_out_WBTH: the stream behind it.
            real_BT: false at padding.
        """

    def score(self, probe: Probe) -> Tensor:
        """Return scores ``[L]``: 0 within the window of the smallest mean change, 1 outside."""
        windows = self.num_layers + 1 - self.target
        total, count = torch.zeros(windows), torch.zeros(windows)
        for h_JBTH, real_BT in probe.states():
            change_WN = self.change(h_JBTH[: -self.target], h_JBTH[self.target :], real_BT)
            total += change_WN.sum(-1).cpu()
            count += change_WN.shape[-1]
        best = min(self.starts, key=probe.mean(total, count).nan_to_num(nan=BROKEN).tolist().__getitem__)
        score = torch.ones(self.num_layers)
        score[best : best + self.target] = 0.0
        return score
