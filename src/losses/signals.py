"""A signal holds a teacher's distribution over the next token, from a live model or from a cache.

A loss takes a signal, never a teacher. ``TopK`` is the economical form: the k likeliest tokens with their
full-vocabulary log-probabilities, the exact entropy, and the logarithm of the mass outside. ``Dense`` is
the whole distribution.

No log-probability is ever below ``FLOOR``, whose exponential is exactly zero in float32: impossible
tokens keep zero mass, and ``0 * log 0`` is 0, not NaN, in values and in gradients.

Temperature. At a temperature T, ``p_T ~ p^(1/T)`` follows exactly for the stored tokens. The mass outside
does not; it is extrapolated from the mass r and the entropy h of the tokens outside at T = 1, both of which
follow from what is stored:  ``log rest_T = log(r)/T + (1 - 1/T) h``. This is the tangent of the true log-mass
at T = 1. It is exact at T = 1, and at every T if all tokens outside are equally likely; it is never above the
truth. So at other temperatures the rule ``bucket`` of :mod:`src.losses.kl` has its zero near, not at,
student = teacher. ``renormalise`` does not use the mass outside.

Shapes: N tokens, V vocabulary, K tokens kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from src.models.vocabulary import within

if TYPE_CHECKING:
    from src.models.head import OutputHead

FLOOR = -1e4


@dataclass(frozen=True)
class TopK:
    """Holds the k likeliest tokens of each position.

    Attributes:
        ids: ``[..., K]`` tokens, likeliest first.
        log_probs: ``[..., K]`` their log-probabilities under the full vocabulary, nats, float32.
        entropy: ``[...]`` entropy of the full distribution, nats.
        log_rest: ``[...]`` logarithm of the mass outside the k tokens.
    """

    ids: Tensor
    log_probs: Tensor
    entropy: Tensor
    log_rest: Tensor

    def select(self, index: Tensor | slice) -> TopK:
        """Return the signal of some positions of the first dimension."""
        return TopK(*(x[index] for x in (self.ids, self.log_probs, self.entropy, self.log_rest)))

    def truncate(self, k: int) -> TopK:
        """Return the signal with the ``k`` likeliest of its tokens; the mass of the others joins the rest."""
        others = torch.cat([self.log_probs[..., k:], self.log_rest[..., None]], -1)
        return TopK(self.ids[..., :k], self.log_probs[..., :k], self.entropy, others.logsumexp(-1))

    def within(self, vocabulary: int) -> TopK:
        """Return the signal over a smaller vocabulary: tokens beyond it lose their mass to the others.

        All positions keep the same number of tokens: as many as the position that loses most of its k has
        left. The mass of further ones joins ``log_rest``. Tokens beyond the vocabulary that are not among the
        k cannot be told from the rest; their mass stays in ``log_rest``.

        Args:
            vocabulary: ids from this number on are beyond it.
        """
        beyond = self.ids >= vocabulary
        lost = int(beyond.sum(-1).amax()) if beyond.numel() else 0
        if lost == 0:
            return self
        p_log_p = (self.log_probs.exp() * self.log_probs).masked_fill(~beyond, 0.0).sum(-1)
        order = beyond.to(torch.uint8).argsort(dim=-1, stable=True)  # likeliest first, those beyond last
        inside = self.log_probs.masked_fill(beyond, -math.inf).gather(-1, order)
        total = torch.cat([inside, self.log_rest[..., None]], -1).logsumexp(-1)
        entropy = ((self.entropy + p_log_p) * (-total).exp() + total).clamp_min(0.0)
        log_probs = (inside - total[..., None]).clamp_min(FLOOR)
        whole = TopK(self.ids.gather(-1, order), log_probs, entropy, (self.log_rest - total).clamp_min(FLOOR))
        return whole.truncate(self.ids.shape[-1] - lost)

    def tempered(self, temperature: float, vocabulary: int) -> tuple[Tensor, Tensor]:
        """Return log-probabilities ``[..., K]`` and the log-mass outside ``[...]`` at a temperature.

        ``vocabulary`` is the number V of all tokens, which bounds the extrapolation (see the module).
        """
        power, inside, rest = 1 / temperature, self.log_probs, self.log_rest
        if temperature != 1 and inside.shape[-1] < vocabulary:
            mass = rest.exp().clamp_min(1e-30)
            spread = (self.entropy + (inside.exp() * inside).sum(-1)) / mass + rest
            most = math.log(vocabulary - inside.shape[-1])
            rest = power * rest + (1 - power) * spread.clamp(0, most)
        classes = torch.cat([power * inside, rest[..., None]], -1).log_softmax(-1).clamp_min(FLOOR)
        return classes[..., :-1], classes[..., -1]


@dataclass(frozen=True)
class Dense:
    """Holds the whole distribution of each position: ``log_probs [..., V]``, nats, float32."""

    log_probs: Tensor

    @property
    def entropy(self) -> Tensor:
        """Entropy ``[...]`` of each distribution, nats."""
        return -(self.log_probs.exp() * self.log_probs).sum(-1)

    def select(self, index: Tensor | slice) -> Dense:
        """Return the signal of some positions of the first dimension."""
        return Dense(self.log_probs[index])

    def tempered(self, temperature: float) -> Dense:
        """Return the distribution ``p_T ~ p^(1/T)``."""
        if temperature == 1:
            return self
        return Dense((self.log_probs / temperature).log_softmax(-1).clamp_min_(FLOOR))

    def truncate(self, k: int) -> TopK:
        """Return the signal with the ``k`` likeliest tokens; the mass of the others is its rest."""
        return _joined([topk_signal(part, k) for part in self.log_probs.split(256) or (self.log_probs,)])


Signal = TopK | Dense


def dense_signal(logits: Tensor) -> Dense:
    """Return the whole distribution of logits ``[..., V]`` as a signal."""
    return Dense(logits.float().log_softmax(-1).clamp_min_(FLOOR))


def topk_signal(logits: Tensor, k: int) -> TopK:
    """Return the signal of logits ``[..., V]``, truncated to the ``k`` likeliest tokens (at most V)."""
    return _topk(logits.float().clone(), k, torch.empty_like(logits, dtype=torch.float32))


def _topk(x: Tensor, k: int, e: Tensor) -> TopK:
    """Return :func:`topk_signal` of float32 logits ``x``, which are overwritten, as is ``e`` of their shape.

    Without reuse, most of the time would go into fresh buffers as large as the logits.
    """
    top, ids = x.topk(min(k, x.shape[-1]), dim=-1)
    x.sub_(top[..., :1]).clamp_(min=FLOOR)
    torch.exp(x, out=e).scatter_(-1, ids, 0.0)
    inside = (top - top[..., :1]).clamp_min(FLOOR)
    p, rest = inside.exp(), e.sum(-1)  # summed, not 1 - sum: small residues survive float32
    total = rest + p.sum(-1)
    entropy = total.log() - (x.mul_(e).sum(-1) + (p * inside).sum(-1)) / total
    log_probs = (inside - total.log()[..., None]).clamp_min(FLOOR)
    return TopK(ids, log_probs, entropy, (rest.log() - total.log()).clamp_min(FLOOR))


@torch.no_grad()
def live_signal(
    head: OutputHead, hidden_NH: Tensor, k: int | None, chunk: int = 256, vocabulary: int | None = None
) -> Signal:
    """Return a teacher's signal at N positions, computed from its hidden states in chunks.

    With a k, no tensor ``[N, V]`` is ever held.

    Args:
        head: output head of the teacher.
        hidden_NH: its final hidden states at N positions.
        k: likeliest tokens to keep; None keeps the whole distribution.
        chunk: positions that pass through the head at a time.
        vocabulary: number of the student's logits, to which the teacher's are cut, or padded with
            minus infinity; None keeps them. One family's models may pad a common vocabulary to other widths.
    """

    def logits_of(h_nH: Tensor) -> Tensor:
        logits = head.logits(h_nH)
        return logits if vocabulary is None else within(logits, vocabulary)

    pieces = hidden_NH.split(chunk) or (hidden_NH,)
    if k is None:
        parts = [dense_signal(logits_of(h)).log_probs for h in pieces]
        return Dense(torch.cat(parts) if len(parts) > 1 else parts[0])
    tops, buffer = list[TopK](), hidden_NH.new_empty(0, dtype=torch.float32)
    for h in pieces:
        logits = logits_of(h).float()
        buffer = buffer if len(buffer) >= len(h) > 0 else torch.empty_like(logits)
        tops.append(_topk(logits, k, buffer[: len(h)]))
    return _joined(tops)


def _joined(tops: Sequence[TopK]) -> TopK:
    fields = ("ids", "log_probs", "entropy", "log_rest")
    return TopK(*(torch.cat([getattr(top, field) for top in tops]) for field in fields))
