"""AdamS, the optimiser of CAST (arXiv 2509.25996): Adam that drives two of each four weights to zero.

The forward pass stays dense. In each four of a matrix along its input, the two weights smallest in size are
masked. Step t of T gives the masked ones, and no others, an L1 penalty ``p``, and fades their gradient:

    a       = t / T
    g, p    = (1 - a) G, a penalty  if masked;   G, 0  if kept
    mean   <- b1 mean + (1 - b1) g
    square <- b2 square + (1 - b2) (g^2 + p^2)
    W      <- W - lr (mean / (1 - b1^t) + p sign(W)) / (sqrt(square / (1 - b2^t)) + eps)

Masks are renewed every few steps, so a weight that grows again is kept. At the end masked weights are nearly
zero, and setting them to zero changes next to nothing. The paper's are the masks, the ramp, the fading and
the penalty beside the first moment. Ours are two things. The second moment is Adam's of ``g``, with the
penalty's square: so a kept weight makes Adam's step, and near zero the penalty bounds what a faded gradient
does. And a masked weight that a step would carry past zero stops there.

The paper scales weights, to make up for what the decay takes, by factors that fold into them. Ours is one
factor ``exp(s)`` for each output of a matrix. It never leaves the optimiser: the model holds the folded
``exp(s) W``, of which the gradients of ``W`` and ``s`` follow. So checkpoints and exports are plain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from src.errors import ConfigError
from src.models.two_four import two_of_four
from src.ranges import Count, NonNegative, Positive, checked, share


class AdamS(torch.optim.Optimizer):
    """Is Adam, except that it drives weights to zero in the matrices that :meth:`sparsify` names.

    ``src.callbacks.Sparsify`` names them, moves the ramp and sets to zero what is masked at the end.

    Args:
        params: parameters to learn.
        lr: step length.
        betas: decay of the first and of the second moment.
        eps: added to the root of the second moment.
        penalty: size of the L1 penalty's gradient at the end of the ramp.
        renew: steps from one choice of the masks to the next.
        scaled: learn a factor for each output of a matrix.
    """

    @checked
    def __init__(
        self,
        params: Iterable[Any],
        lr: Positive = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: NonNegative = 1e-8,
        penalty: NonNegative = 1e-2,
        renew: Count = 10,
        scaled: bool = True,
    ) -> None:
        if not all(beta in share and beta < 1 for beta in betas):
            raise ConfigError(f"betas: {betas} given; accepted: two numbers from 0 to below 1.")
        keys = {"lr": lr, "betas": tuple(betas), "eps": eps, "penalty": penalty, "renew": renew}
        super().__init__(params, keys | {"scaled": scaled, "ramp": 0.0})
        self._axes: dict[Tensor, int] = {}

    def sparsify(self, axes: Mapping[Tensor, int]) -> None:
        """Drive weights to zero in some of the matrices from now on.

        Args:
            axes: the input axis of each.
        """
        self._axes = dict(axes)

    def ramp(self, done: float) -> None:
        """Set the share ``a`` of the run that is done with the next step."""
        for group in self.param_groups:
            group["ramp"] = done

    @torch.no_grad()
    def harden(self) -> float:
        """Set the masked weights to zero; return the share that they had in the squared norm of all."""
        gone = whole = 0.0
        for p, axis in self._axes.items():
            kept = two_of_four(p, axis)
            gone += float(p.masked_fill(kept, 0.0).square().sum())
            whole += float(p.square().sum())
            p.mul_(kept)
        return gone / (whole or 1.0)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update; a ``closure``, if given, computes gradients first, and its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                state.setdefault("step", 0)
                state["step"] += 1
                if p in self._axes:
                    self._sparse(p, state, group)
                else:
                    _adam(p, p.grad, state, "", group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; masks stay bool, of which torch makes numbers of the parameters' type."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            if "kept" in state:
                state["kept"] = state["kept"].bool()

    def _sparse(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Make the update of a matrix ``p = exp(s) W`` and of its factors."""
        axis, a, grad = self._axes[p], group["ramp"], p.grad
        assert grad is not None
        if (state["step"] - 1) % group["renew"] == 0:  # a row's factor does not change which are largest
            state["kept"] = two_of_four(p, axis)
        if "scale" not in state:
            state["scale"] = torch.zeros_like(p.narrow(axis, 0, 1))
        masked, s = ~state["kept"], state["scale"].clone()
        if group["scaled"]:
            _adam(state["scale"], (grad * p).sum(axis, keepdim=True), state, "scale_", group)
        beta1, beta2 = group["betas"]
        mean, square = _moments(p, state, "")
        grad = grad * s.exp()
        grad, penalty = torch.where(masked, (1 - a) * grad, grad), a * group["penalty"] * masked
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).add_((1 - beta2) * (grad.square() + penalty.square()))
        root = (square / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        update = (mean / (1 - beta1 ** state["step"]) + penalty * p.sign()) / root
        moved = p - group["lr"] * s.exp() * update
        p.copy_(moved.masked_fill_(masked & (moved * p < 0), 0.0) * (state["scale"] - s).exp())


def _moments(p: Tensor, state: dict[str, Any], prefix: str) -> tuple[Tensor, Tensor]:
    """Return the two moments of a parameter, zero at first; ``prefix`` is before their names in the state."""
    names = [f"{prefix}{name}" for name in ("mean", "square")]
    first, second = (state.setdefault(name, torch.zeros_like(p)) for name in names)
    return first, second


def _adam(p: Tensor, grad: Tensor, state: dict[str, Any], prefix: str, group: dict[str, Any]) -> None:
    """Make the update of Adam, in torch's order of operations."""
    beta1, beta2 = group["betas"]
    mean, square = _moments(p, state, prefix)
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = (square.sqrt() / (1 - beta2 ** state["step"]) ** 0.5).add_(group["eps"])
    p.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1 ** state["step"]))
