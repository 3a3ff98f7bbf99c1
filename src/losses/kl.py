"""Forward KL from a teacher's signal to a student's logits, one number per token.

For a top-k signal with teacher mass p inside and r outside, and student mass q and s, the rule says what is
done about the outside:

=========== ===================================== ====================================================
bucket      sum p log(p/q) + r log(r/s)           the outside is one more class; never above the full KL
renormalise sum p~ log(p~/q~), both renormalised  blind to the outside
zero        sum p~ log(p~/q), teacher renorm.     pushes the outside to zero: over-confident
=========== ===================================== ====================================================

All three are the full KL at k = V; the first two are zero at student = teacher (``bucket`` at temperature 1
only, because the mass outside is extrapolated at others: :mod:`src.losses.signals`).

A rule is a formula on ``[n, K]``; :class:`_Picked` carries its gradient to the vocabulary in place. With
gradients g for log q and g_s for log s, and G their sum, the logits receive ``g - G q`` inside the top-k
and ``(g_s / s - G) q`` outside: one buffer ``[n, V]`` in each direction.

Shapes: n tokens of a chunk, V vocabulary, K tokens kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from src.losses.signals import FLOOR, Dense, Signal

Rule = Literal["bucket", "renormalise", "zero"]


def kl(logits_nV: Tensor, signal: Signal, rule: Rule = "bucket", temperature: float = 1.0) -> Tensor:
    """Divergence ``[n]`` of each token, nats, differentiable in the logits.

    Args:
        logits_nV: the student's, any float type; computed in float32.
        signal: the teacher's, of the same n tokens.
        rule: what is done about the mass outside a top-k; a dense signal has none.
        temperature: of both sides (not multiplied by its square here).
    """
    logits_nV = logits_nV.float() if temperature == 1 else logits_nV.float() / temperature
    if isinstance(signal, Dense):
        log_p = signal.log_probs
        if temperature != 1:
            log_p = (log_p / temperature).log_softmax(-1).clamp_min_(FLOOR)
        dense: Callable[..., Tensor] = _DenseKL.apply
        return dense(logits_nV, log_p)
    log_p, log_r = signal.tempered(temperature, logits_nV.shape[-1])
    picked: Callable[..., tuple[Tensor, Tensor]] = _Picked.apply
    log_q, log_s = picked(logits_nV, signal.ids)
    return RULES[rule](log_p, log_r, log_q, log_s)


def _bucket(log_p: Tensor, log_r: Tensor, log_q: Tensor, log_s: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1) + log_r.exp() * (log_r - log_s)


def _renormalise(log_p: Tensor, log_r: Tensor, log_q: Tensor, log_s: Tensor) -> Tensor:
    log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _zero(log_p: Tensor, log_r: Tensor, log_q: Tensor, log_s: Tensor) -> Tensor:
    log_p = log_p.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


RULES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "bucket": _bucket,
    "renormalise": _renormalise,
    "zero": _zero,
}


class _Picked(torch.autograd.Function):
    """Log-softmax at ``ids [n, K]``, and the logarithm of the mass everywhere else."""

    @staticmethod
    def forward(ctx: Any, logits_nV: Tensor, ids_nK: Tensor) -> tuple[Tensor, Tensor]:
        top = logits_nV.amax(-1, keepdim=True)
        e = (logits_nV - top).exp_()
        inside = e.gather(-1, ids_nK)
        rest = e.scatter_(-1, ids_nK, 0.0).sum(-1)  # never 1 - sum: no cancellation
        total = rest + inside.sum(-1)
        log_q = logits_nV.gather(-1, ids_nK) - top - total.log()[:, None]
        ctx.parts = e, ids_nK, inside, rest, total
        return log_q.clamp_min_(FLOOR), (rest.log() - total.log()).clamp_min_(FLOOR)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g_nK: Tensor, g_rest: Tensor) -> tuple[Tensor, None]:
        e, ids_nK, inside, rest, total = ctx.parts
        share = (g_nK.sum(-1) + g_rest) / total
        outside = g_rest / rest.clamp_min(torch.finfo(rest.dtype).tiny) - share
        grad = e.mul_(outside[:, None])
        return grad.scatter_(-1, ids_nK, g_nK - inside * share[:, None]), None


class _DenseKL(torch.autograd.Function):
    """``sum_v p (log p - log q)``, whose gradient in the logits is ``q - p``."""

    @staticmethod
    def forward(ctx: Any, logits_nV: Tensor, log_p_nV: Tensor) -> Tensor:
        log_q = logits_nV.log_softmax(-1).clamp_min_(FLOOR)
        p = log_p_nV.exp()
        value = (log_p_nV - log_q).mul_(p).sum(-1)
        ctx.difference = log_q.exp_().sub_(p)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g_n: Tensor) -> tuple[Tensor, None]:
        return ctx.difference.mul_(g_n[:, None]), None
