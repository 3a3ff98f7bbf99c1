"""A recovery's loss: a weighted sum of terms."""

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
    """A term and how much it counts.

    Attributes:
        term: the term.
        weight: factor on its value.
    """

    term: Term
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ConfigError(
                f"terms: weight: {self.weight} given; accepted: above 0. Or leave the term out."
            )


class Objective:
    """The sum of the terms, and the one divergence that the teacher is asked for and validation reports.

    Args:
        distillation: the first term, with weight 1; None leaves it to ``terms``.
        terms: further terms; without any, the sum is the distillation (the default one if none is given).

    Attributes:
        distillation: the divergence among the terms; where none is, the default one.

    Raises:
        ConfigError: two terms are of one class, and would be logged under one name.
    """

    def __init__(self, distillation: Distillation | None, terms: Sequence[Weighted] | None = None) -> None:
        first = distillation or (None if terms else Distillation())
        self.terms = [*([Weighted(first)] if first else []), *(terms or ())]
        names = [type(each.term).__name__ for each in self.terms]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(
                f"terms: {', '.join(twice)} is given twice (model.distillation is a term too, of weight 1). "
                f"Give it once; set model.distillation to null to give it another weight among the terms."
            )
        own = (each.term for each in self.terms if isinstance(each.term, Distillation))
        self.distillation = next(own, Distillation())

    def pairs(self, mask: Mask) -> tuple[Pair, ...]:
        """The layers whose streams the terms compare, each pair once."""
        return tuple(dict.fromkeys(pair for each in self.terms for pair in each.term.pairs(mask)))

    def __call__(self, step: Step) -> dict[str, Tensor]:
        """The weighted sum as ``loss``; beside it, without gradient, every term's figures by name."""
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
