"""The loss of a recovery: a weighted sum of terms, of which the distillation is usually the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from src.errors import ConfigError
from src.losses.distill import Distillation
from src.losses.terms import Pair, Step, Term
from src.mask import Mask


@dataclass(frozen=True)
class Weighted:
    """Pairs a term with its weight in the sum.

    Attributes:
        term: one summand.
        weight: factor on its value, above 0.
    """

    term: Term
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ConfigError(
                f"terms: weight: {self.weight} given; accepted: above 0. Or leave the term out."
            )


class Objective:
    """Computes the weighted sum of the terms of a loss.

    Args:
        distillation: the first term of the sum, of weight 1; None leaves it out.
        terms: further terms. With neither, the sum is the default distillation alone.

    Attributes:
        terms: all terms, each with its weight.
        distillation: the distillation among the terms, or the default one if there is none. Validation
            reports its divergence, and its ``k`` says how many tokens the teacher's signal holds.

    Raises:
        ConfigError: two terms are of the same class, so their figures would have the same names.
    """

    def __init__(self, distillation: Distillation | None, terms: Sequence[Weighted] | None = None) -> None:
        first = distillation or (None if terms else Distillation())
        self.terms = [*([Weighted(first)] if first else []), *(terms or ())]
        names = [type(each.term).__name__ for each in self.terms]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(
                f"terms: {', '.join(repeated)} is given twice (model.distillation is a term of weight 1). "
                f"Give it once; set model.distillation to null to give it another weight among the terms."
            )
        divergences = (each.term for each in self.terms if isinstance(each.term, Distillation))
        self.distillation = next(divergences, Distillation())

    def pairs(self, mask: Mask) -> tuple[Pair, ...]:
        """Return, each once, the pairs (student's layer, parent's layer) whose streams some term compares."""
        return tuple(dict.fromkeys(pair for each in self.terms for pair in each.term.pairs(mask)))

    def __call__(self, step: Step) -> dict[str, Tensor]:
        """Return the weighted sum under ``loss``, and the figures of every term by name, without gradient."""
        out: dict[str, Tensor] = {}
        total: Tensor | None = None
        for each in self.terms:
            figures = each.term.loss(step)
            value = figures.pop("loss")
            value = value if each.weight == 1 else value * each.weight
            total = value if total is None else total + value
            out |= figures
        assert total is not None, "there is always a term"
        return {"loss": total, **out}
