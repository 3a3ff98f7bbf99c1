"""Compute the distillation loss and its gradient, without ever holding logits ``[N, V]``.

    loss = mean over tokens of  w (alpha T^2 KL + (1 - alpha) CE)

KL is the divergence of the student from the teacher (:mod:`src.losses.kl`) at temperature T, CE the
cross-entropy on the label, and w the weight of the token (:mod:`src.losses.entropy`).

Only supervised positions pass through the output head, a chunk at a time. The gradient of a chunk is taken
as soon as its loss is known, and its logits are dropped: the head runs once forward and once back for each
token, as in the unchunked loss, and logits are neither stored nor recomputed. A frozen head gets no weight
gradient.

Shapes: N supervised positions of a batch, n positions of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from src.errors import ConfigError, did_you_mean
from src.losses.entropy import Weight, check_weight, token_weights
from src.losses.kl import Rule, kl, tailed_kl
from src.losses.signals import Dense, Signal, live_signal
from src.losses.terms import Step, Term
from src.models.head import OutputHead
from src.ranges import Count, NonNegative, Positive, Share, checked
from src.training.ranks import WholeBatch

TAIL = (
    "distillation.tail: it reads the teacher's whole distribution, of which a cache holds the likeliest "
    "tokens alone. Use src.teachers.LiveTeacher, or set it to 0."
)


class Distillation(Term):
    """Computes the divergence of a student from a teacher's signal; tokens weigh by the teacher's entropy.

    Args:
        k: likeliest tokens of the teacher that are used; None uses the whole distribution.
        rule: what is done about the mass outside the k: ``bucket``, ``renormalise`` or ``zero``
            (src/losses/kl.py).
        weight: how the entropy gives a token's weight: ``linear``, ``ratio``, ``eakd``, ``topq`` or ``none``
            (src/losses/entropy.py).
        weight_lambda: strength of ``linear``.
        temperature: divides the logits of both models; its square multiplies the divergence.
        alpha: share of the divergence in the loss; the rest is cross-entropy on the labels.
        chunk_tokens: positions that pass through the output head at a time; fewer take less memory.
        mean_entropy: mean entropy of the teacher over the corpus, nats, which a cache prints when it is
            complete. With it a token weighs the same in every batch; None makes each batch's mean weight 1.
        reverse_below: entropy of the teacher in nats; a token below it has the reverse divergence. 0: none.
        tail: weight of the distribution within the tail, outside the k, beside the ``bucket`` divergence,
            which knows its mass alone; 1 is the full divergence. Above 0 it needs a live teacher.
    """

    @checked
    def __init__(
        self,
        k: Count | None = 10,
        rule: Rule = "bucket",
        weight: Weight = "linear",
        weight_lambda: NonNegative = 1.0,
        temperature: Positive = 1.0,
        alpha: Share = 1.0,
        chunk_tokens: Count = 256,
        mean_entropy: Positive | None = None,
        reverse_below: NonNegative = 0.0,
        tail: NonNegative = 0.0,
    ) -> None:
        if rule not in get_args(Rule):
            accepted = get_args(Rule)
            raise ConfigError(f"rule: '{rule}' is none of {accepted}.{did_you_mean(rule, accepted)}")
        check_weight(weight)
        self.k, self.rule, self.weight, self.weight_lambda = k, rule, weight, weight_lambda
        self.temperature, self.alpha, self.chunk_tokens = temperature, alpha, chunk_tokens
        self.mean_entropy, self.reverse_below, self.tail = mean_entropy, reverse_below, tail
        if tail and (k is None or rule != "bucket"):
            raise ConfigError(
                f"tail: {tail:g} given with k: {k} and rule: {rule}. It weighs what the rule 'bucket' leaves "
                f"out of the full divergence: give k and rule: bucket, or tail: 0."
            )

    @property
    def asks(self) -> int | None:
        """How many of its likeliest tokens the teacher's signal must hold; None is the whole distribution."""
        return None if self.tail else self.k

    def __call__(
        self,
        head: OutputHead,
        hidden_NH: Tensor,
        labels_N: Tensor,
        signal: Signal,
        whole: WholeBatch | None = None,
    ) -> dict[str, Tensor]:
        """Return the loss of a batch, and the figures that are logged.

        Args:
            head: output head of the student.
            hidden_NH: its final hidden states at the supervised positions.
            labels_N: the tokens these positions predict.
            signal: the teacher's distribution at these positions.
            whole: the batch of all ranks that these positions are a part of. The mean over the ranks of each
                returned scalar is then the mean over all its positions. None: these are all.

        Returns:
            Scalars: ``loss``; and in nats, unweighted and without gradient, the mean divergence times T^2 as
            ``kd`` and, if ``alpha < 1``, the mean cross-entropy ``ce``.
        """
        weights_N = self._weights(head, hidden_NH, signal, whole)

        def chunk(h_nH: Tensor, at: slice, into: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            logits = head.logits(h_nH, into)
            kd = self._divergence(logits, signal.select(at)) * self.temperature**2
            if self.alpha == 1:
                return _sum(weights_N[at], kd), kd.detach()[None]
            ce = F.cross_entropy(logits.float(), labels_N[at], reduction="none")
            mixed = self.alpha * kd + (1 - self.alpha) * ce
            return _sum(weights_N[at], mixed), torch.stack([kd.detach(), ce.detach()])

        loss, parts_PN = chunked(chunk, hidden_NH, head.parameters, self.chunk_tokens, head.sums)
        count = (len(hidden_NH) if whole is None else whole.share) or 1
        means = parts_PN.sum(-1) / count
        return {"loss": loss / count, **dict(zip(("kd", "ce"), means, strict=False))}

    def loss(self, step: Step) -> dict[str, Tensor]:
        """Return the scalars ``loss``, ``kd`` and, if ``alpha < 1``, ``ce``: means over supervised positions.

        ``kd`` is the divergence times T^2, in nats; ``ce`` the cross-entropy. Both are unweighted and have no
        gradient.
        """
        return self(step.head, step.hidden_NH, step.labels_N, step.signal, step.whole)

    def measured(self, step: Step) -> Tensor:
        """Return the mean divergence of validation: at temperature 1, unweighted, without the tail's own."""
        signal = step.signal.truncate(self.k) if self.tail and self.k else step.signal
        plain = Distillation(k=self.k, rule=self.rule, weight="none")
        return plain.loss(replace(step, signal=signal))["kd"]

    def _divergence(self, logits_nV: Tensor, signal: Signal) -> Tensor:
        if not self.tail or self.k is None:
            alone = self.alpha == 1  # nothing else reads the logits
            return kl(logits_nV, signal, self.rule, self.temperature, self.reverse_below, overwrite=alone)
        if not isinstance(signal, Dense):
            raise ConfigError(TAIL)
        return tailed_kl(logits_nV, signal, self.k, self.tail, self.temperature, self.reverse_below)

    def _weights(
        self, head: OutputHead, hidden_NH: Tensor, signal: Signal, whole: WholeBatch | None
    ) -> Tensor:
        if self.weight == "none":
            return hidden_NH.new_ones(len(hidden_NH), dtype=torch.float32)
        student = None
        if self.weight == "eakd":
            student = live_signal(head, hidden_NH.detach(), 1, self.chunk_tokens).entropy
        return token_weights(
            self.weight,
            signal.entropy,
            head.vocabulary,
            self.weight_lambda,
            student,
            self.mean_entropy,
            whole,
        )


def _sum(weights_n: Tensor, losses_n: Tensor) -> Tensor:
    """Return the weighted sum in float32; autocast would compute the products of ``@`` in half precision."""
    return (weights_n * losses_n).sum()


Chunk = Callable[[Tensor, slice, tuple[Tensor, ...]], tuple[Tensor, Tensor]]


def chunked(
    chunk: Chunk, hidden_NH: Tensor, parameters: tuple[Tensor, ...], size: int, sums: bool = False
) -> tuple[Tensor, Tensor]:
    """Sum a loss over chunks of tokens, holding one chunk's graph at a time.

    Args:
        chunk: ``(hidden [n, H], slice of N, buffers) -> (loss, parts [P, n])``. The loss is the sum over the
            chunk. The parts are P figures of each token, to be logged, without gradient.
        hidden_NH: hidden states, which receive a gradient if they require one.
        parameters: weights that ``chunk`` uses; those that require a gradient receive one.
        size: tokens of a chunk.
        sums: whether the backward pass of ``chunk`` itself adds the parameters' gradients to ``buffers``: one
            in float32 for each parameter that requires a gradient. Otherwise ``buffers`` is empty.

    Returns:
        The loss (scalar) and the parts ``[P, N]``.
    """
    run: Callable[..., tuple[Tensor, Tensor]] = _Chunked.apply
    return run(chunk, size, sums, torch.is_grad_enabled(), hidden_NH, *parameters)


class _Chunked(torch.autograd.Function):
    """Makes gradients in the forward pass and scales them in the backward pass.

    The chunks of a parameter's gradient are added up in float32, whatever its type.
    """

    @staticmethod
    def forward(
        ctx: Any, chunk: Chunk, size: int, sums: bool, graded: bool, hidden_NH: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        own = [x for x in parameters if graded and x.requires_grad]
        into = tuple(torch.zeros_like(x, dtype=torch.float32) for x in own)
        sums = sums and bool(own)
        differentiates = graded and hidden_NH.requires_grad
        hidden_grad = torch.zeros_like(hidden_NH) if differentiates else None
        loss, parts = hidden_NH.new_zeros((), dtype=torch.float32), []
        for start in range(0, max(1, len(hidden_NH)), size):
            at = slice(start, start + size)
            h_nH = hidden_NH[at].detach().requires_grad_(differentiates or sums)
            with torch.set_grad_enabled(differentiates or bool(own)):
                value, part = chunk(h_nH, at, into if sums else ())
            if inputs := [*([h_nH] if h_nH.requires_grad else []), *(() if sums else own)]:
                grads = list(torch.autograd.grad(value, inputs))
                if h_nH.requires_grad:
                    first = grads.pop(0)
                    if hidden_grad is not None:
                        hidden_grad[at] = first
                for total in into if grads else ():
                    total += grads.pop(0)  # none outlives its turn: each is as large as the weights
            loss += value.detach()
            parts.append(part)
        parts_PN = torch.cat(parts, -1)
        sums_ = iter(into)
        grads_P = [next(sums_).to(x.dtype) if graded and x.requires_grad else None for x in parameters]
        ctx.grads = [hidden_grad, *grads_P]
        ctx.mark_non_differentiable(parts_PN)
        return loss, parts_PN

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("the gradients of this loss were handed out; compute it again")
        grads, ctx.grads = ctx.grads, None  # the last holder: no copy is made of them
        return None, None, None, None, *(g if g is None else g.mul_(grad) for g in grads)
