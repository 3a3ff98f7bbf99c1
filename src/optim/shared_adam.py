"""Adam with one second moment for all parameters, made for the few logits of a mask.

Adam divides each logit's gradient by that gradient's own size. The gradients of a mask mostly share a sign,
so their relative size is the information on which layer matters more, and that division removes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from src.errors import ConfigError
from src.ranges import NonNegative, Positive, checked, share


class SharedAdam(torch.optim.Optimizer):
    """Is Adam, except that all entries of a parameter group share one second moment, the mean of theirs.

    The ratios between updates are the ratios between first moments, and scaling every gradient by a constant
    changes nothing.

    Args:
        params: parameters to learn.
        lr: step length in units of the parameters.
        betas: decay of the first and of the second moment.
        eps: added to the root of the second moment.
    """

    @checked
    def __init__(
        self,
        params: Iterable[Any],
        lr: Positive = 0.05,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: NonNegative = 1e-12,
    ) -> None:
        if not all(beta in share for beta in betas):
            raise ConfigError(f"betas: {betas} given; accepted: two numbers from 0 to 1.")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update; a ``closure``, if given, computes gradients first, and its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            beta1, beta2 = group["betas"]
            count = sum(p.numel() for p in params)
            square = torch.stack([p.grad.pow(2).sum() for p in params]).sum() / count
            for p in params:
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["mean"], state["square"] = torch.zeros_like(p), torch.zeros((), device=p.device)
                state["step"] += 1
                state["mean"].lerp_(p.grad, 1 - beta1)
                state["square"].lerp_(square, 1 - beta2)
                root = (state["square"] / (1 - beta2 ** state["step"])).sqrt() + group["eps"]
                p.sub_(group["lr"] / (1 - beta1 ** state["step"]) * state["mean"] / root)
        return loss
