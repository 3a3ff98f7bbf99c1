"""Cross-entropy on the labels, as a term of a recovery's loss.

All tokens weigh the same, and the output head runs once more for this term. ``Distillation(alpha=...)``
computes a cross-entropy in the same pass as its divergence, and weighs the tokens of both by entropy.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from src.losses.distill import chunked
from src.losses.terms import Step, Term
from src.ranges import Count, checked


class CrossEntropy(Term):
    """Computes the mean cross-entropy of the next token (nats), logged as ``ce``.

    Args:
        chunk_tokens: positions that pass through the output head at a time; fewer take less memory.
    """

    @checked
    def __init__(self, chunk_tokens: Count = 256) -> None:
        self.chunk_tokens = chunk_tokens

    def loss(self, step: Step) -> dict[str, Tensor]:
        head = step.head

        def chunk(h_nH: Tensor, at: slice, into: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            ce_n = F.cross_entropy(head.logits(h_nH, into).float(), step.labels_N[at], reduction="none")
            return ce_n.sum(), ce_n.detach()[None]

        total, _ = chunked(chunk, step.hidden_NH, head.parameters, self.chunk_tokens, head.sums)
        return {"loss": total / step.count, "ce": total.detach() / step.count}
