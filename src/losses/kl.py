"""KL divergence between a teacher's signal and a student's logits, one number for each token.

A top-k signal stores the teacher's probabilities p of K tokens, and its mass r outside them. The student has
the probabilities q of the same tokens, and the mass s outside. A rule defines the divergence:

=========== ========================== ===============================================================
bucket      sum p log(p/q) + r log(r/s) all tokens outside are one more class; never above the full KL
renormalise sum p' log(p'/q')           p' and q' are p and q divided by their sums; ignores r and s
zero        sum p' log(p'/q)            lowest at s = 0, so the student becomes over-confident
=========== ========================== ===============================================================

At K = V all three are the full KL. ``bucket`` and ``renormalise`` are zero where student and teacher agree.
For ``bucket`` this holds at temperature 1 only, because r at other temperatures is an extrapolation
(:mod:`src.losses.signals`).

These are forward: the student must cover all that the teacher finds possible. The reverse divergence is the
same rule with the two exchanged (p for q, r for s); it holds the student to what the teacher finds likely.
Forward where the teacher is uncertain and reverse where it is sure is the split by entropy of arXiv
2603.07079; the threshold in nats is ours.

The distribution *within* the tail, the tokens outside the k, is what ``bucket`` leaves out. By the chain rule

    full KL = bucket + r KL(p / r || q / s within the tail),

and arXiv 2602.20816 gives the second summand more weight than its small mass r does. :func:`tailed_kl` weighs
it: 0 is ``bucket``, 1 the full KL. The same holds of the reverse divergence, whose mass is s.

A rule is a formula on ``[n, K]``, differentiated by autograd. :class:`_LogProbs` carries its gradient to the
logits with one buffer ``[n, V]`` in each direction: with gradients g for log q and g_s for log s, and G the
sum of all of them, the logits receive ``g - G q`` inside the top-k and ``(g_s / s - G) q`` outside.

Shapes: n tokens of a chunk, V vocabulary, K tokens kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from src.losses.blocks import blocks
from src.losses.signals import FLOOR, Dense, Signal

Rule = Literal["bucket", "renormalise", "zero"]


def kl(
    logits_nV: Tensor,
    signal: Signal,
    rule: Rule = "bucket",
    temperature: float = 1.0,
    reverse_below: float = 0.0,
    overwrite: bool = False,
) -> Tensor:
    """Return the divergence ``[n]`` of each token in nats, differentiable in the logits.

    Args:
        logits_nV: the student's logits, of any float type; the divergence is computed in float32.
        signal: the teacher's signal for the same n tokens.
        rule: treatment of the mass outside a top-k. A dense signal has no such mass, and no rule.
        temperature: divides the logits of both sides. The usual factor of its square is left to the caller.
        reverse_below: entropy of the teacher (nats) below which a token's divergence is the reverse one.
        overwrite: whether the logits may be lost, so that their gradient needs no memory of its own.
    """
    given, logits_nV = logits_nV, logits_nV.float() if temperature == 1 else logits_nV.float() / temperature
    reverse_n = signal.entropy < reverse_below if reverse_below else None
    if isinstance(signal, Dense):
        free = reverse_n is None and (overwrite or logits_nV is not given)
        return _dense(logits_nV, signal.tempered(temperature), reverse_n, free)
    log_p, log_r = signal.tempered(temperature, logits_nV.shape[-1])
    return _classes(logits_nV, signal.ids, log_p, log_r, rule, reverse_n)


def tailed_kl(
    logits_nV: Tensor,
    signal: Dense,
    k: int,
    tail: float,
    temperature: float = 1.0,
    reverse_below: float = 0.0,
) -> Tensor:
    """Return ``[n]``: the divergence by ``bucket``, and ``tail`` times that within the tail with its mass.

    It is exact at every temperature, because the whole distribution is at hand.

    Args:
        logits_nV: the student's logits, as of :func:`kl`.
        signal: the teacher's whole distribution.
        k: likeliest tokens of the teacher; all others are the tail.
        tail: weight of the tail's own summand.
        temperature: as of :func:`kl`.
        reverse_below: as of :func:`kl`.
    """
    logits_nV = logits_nV.float() if temperature == 1 else logits_nV.float() / temperature
    reverse_n = signal.entropy < reverse_below if reverse_below else None
    whole = signal.tempered(temperature)
    top = whole.truncate(k)
    bucket = _classes(logits_nV, top.ids, top.log_probs, top.log_rest, "bucket", reverse_n)
    return bucket + tail * (_dense(logits_nV, whole, reverse_n) - bucket)


def _dense(logits_nV: Tensor, signal: Dense, reverse_n: Tensor | None, overwrite: bool = False) -> Tensor:
    """Return the full divergence, of the tokens ``reverse_n`` the reverse one."""
    dense: Callable[..., Tensor] = _DenseKL.apply
    into_nV = logits_nV.detach() if overwrite else torch.empty_like(logits_nV)
    forward = dense(logits_nV, signal.log_probs, into_nV)
    if reverse_n is None:
        return forward
    log_q = logits_nV.log_softmax(-1).clamp_min(FLOOR)
    return torch.where(reverse_n, (log_q.exp() * (log_q - signal.log_probs)).sum(-1), forward)


def _classes(
    logits_nV: Tensor, ids_nK: Tensor, log_p: Tensor, log_r: Tensor, rule: Rule, reverse_n: Tensor | None
) -> Tensor:
    """Return the divergence of K tokens and the mass outside, of the tokens ``reverse_n`` the reverse one."""
    log_probs: Callable[..., tuple[Tensor, Tensor]] = _LogProbs.apply
    log_q, log_s = log_probs(logits_nV, ids_nK)
    forward = RULES[rule](log_p, log_r, log_q, log_s)
    if reverse_n is None:
        return forward
    return torch.where(reverse_n, RULES[rule](log_q, log_s, log_p, log_r), forward)


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


class _LogProbs(torch.autograd.Function):
    """Computes the log-softmax at ``ids [n, K]``, and the logarithm of the mass of all other tokens."""

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
    """Computes ``sum_v p (log p - log q)``, and ``into`` memory its gradient in the logits, ``q - p``."""

    @staticmethod
    def forward(ctx: Any, logits_nV: Tensor, log_p_nV: Tensor, into_nV: Tensor) -> Tensor:
        ctx.difference, values = into_nV, list[Tensor]()
        for x, log_p, difference in blocks(logits_nV, log_p_nV, into_nV):
            log_q, p = x.log_softmax(-1).clamp_min_(FLOOR), log_p.exp()
            values.append((log_p - log_q).mul_(p).sum(-1))
            torch.sub(log_q.exp_(), p, out=difference)
        return torch.cat(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g_n: Tensor) -> tuple[Tensor, None, None]:
        return ctx.difference.mul_(g_n[:, None]), None, None
