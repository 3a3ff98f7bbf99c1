"""Where the window of differentiated inner steps lies, and how long it is (AT-BPTT, arXiv 2510.04838).

Of T inner steps only those of a window of W are differentiated (:mod:`src.prompts.unroll`), and none is made
behind it. n_t is the norm of the inner gradient at step t, D_t = |n_t - n_(t-1)| with D_0 = 0.

====== ================================= ============================================================
stage  first step of the window          W
====== ================================= ============================================================
early  t ~ softmax(n)                    int(w - d + 2 d rank(D_t) / T): longer where n changes most
middle uniform on 0 ... T - W            w + d
late   T - t - W with t ~ softmax(n)     w - d
====== ================================= ============================================================

A start is moved into 0 ... T - W. The stage moves on when training slows: from early to middle after 0.15 T
validations in a row whose gain is below 1.5 %, from middle to late after 0.125 T whose gain is below 1 %.

*The paper's*, as its code has it: all of this, with the gain in points of a classifier's accuracy. *Ours*:
the gain is the share by which the held-out divergence fell; and a count that is no whole number is reached
when it is passed, where the code compares for equality.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from src.errors import ConfigError
from src.ranges import above_zero, faults, natural, positive, refuse

PATIENCE = {1: (0.15, 0.015), 2: (0.125, 0.01)}
"""By stage: validations in a row without the gain after which it ends, as a share of T; and the gain."""


@dataclass(frozen=True)
class Inner:
    """Says how the inner problem is solved, and how much of that is differentiated.

    Attributes:
        steps: steps of gradient descent, T.
        rate: of the gradient descent.
        window: differentiated steps, w; with a spread of 0 and w = T it is plain back-propagation.
        spread: by how much a window is longer or shorter than that, d.
    """

    steps: int = 8
    rate: float = 5.0
    window: int = 3
    spread: int = 1

    def __post_init__(self) -> None:
        accepted = {"steps": positive, "rate": above_zero, "window": positive, "spread": natural}
        refuse(faults(vars(self), accepted, "model.inner."))
        if not 1 <= self.window - self.spread <= self.window + self.spread <= self.steps:
            raise ConfigError(
                f"model.inner: window {self.window} and spread {self.spread} give windows of "
                f"{self.window - self.spread} to {self.window + self.spread} steps; accepted: within 1 to "
                f"{self.steps}, which is model.inner.steps."
            )


class Windows:
    """Chooses the window of each outer step.

    Args:
        inner: T, w and d.

    Attributes:
        stage: 1 is early, 2 middle, 3 late.
    """

    def __init__(self, inner: Inner) -> None:
        self.inner = inner
        self.stage, self.slow, self.last = 1, 0, math.inf

    @property
    def reads_norms(self) -> bool:
        """Whether the stage goes by the norms of the inner gradients, for which T plain steps are made."""
        return self.stage != 2

    def choose(self, norms_T: Tensor, generator: torch.Generator) -> tuple[int, int]:
        """Return the first step of a window, from 0, and its length W.

        Args:
            norms_T: norm of the inner gradient at each step, read only if :attr:`reads_norms`.
            generator: of the draw.
        """
        steps, w, d = self.inner.steps, self.inner.window, self.inner.spread
        if self.stage == 2:
            return int(torch.randint(steps - w - d + 1, (), generator=generator)), w + d
        at = int(torch.multinomial(norms_T.double().cpu().softmax(0), 1, generator=generator))
        if self.stage == 3:
            return max(0, steps - at - (w - d)), w - d
        change_T = torch.cat([norms_T.new_zeros(1), norms_T.diff().abs()])
        size = int(w - d + 2 * d * int((change_T < change_T[at]).sum()) / steps)
        return min(at, steps - size), size

    def heed(self, divergence: float) -> None:
        """Take the outcome of a validation, and go to the next stage if training has slowed."""
        gain = 1 - divergence / self.last if self.last else 0.0
        self.last = divergence
        if self.stage in PATIENCE:
            share, enough = PATIENCE[self.stage]
            self.slow = self.slow + 1 if gain < enough else 0
            if self.slow >= share * self.inner.steps:
                self.stage, self.slow = self.stage + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"stage": self.stage, "slow": self.slow, "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint has kept."""
        self.stage, self.slow, self.last = state["stage"], state["slow"], state["last"]
