"""The loss of a recovery: a weighted sum of terms, of which the distillation is usually the first."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from src.errors import ConfigError
from src.losses.distill import Distillation
from src.losses.terms import Pair, Step, Term
from src.mask import Mask
from src.ranges import from_zero, share


@dataclass(frozen=True)
class Weighted:
    """Pairs a term with its weight in the sum.

    Attributes:
        term: one summand.
        weight: factor on its value; at 0 its figures are logged, and it trains nothing.
        until: share of the run after which a term on inner layers counts no more, and nothing is collected
            for it.
    """

    term: Term
    weight: float = 1.0
    until: float = 1.0

    def __post_init__(self) -> None:
        for key, given, accepted in (("weight", self.weight, from_zero), ("until", self.until, share)):
            if given not in accepted:
                raise ConfigError(f"terms: {key}: {given} given; accepted: {accepted}.")
        if self.until < 1 and not self.inner:
            raise ConfigError(
                f"terms: until: {self.until} given to {type(self.term).__name__}, without which some weights "
                f"may get no gradient. Accepted below 1: of a term on inner layers, such as HiddenStates."
            )

    @property
    def inner(self) -> bool:
        """Whether the term reads inner layers, so that others reach all that it reaches."""
        return self.term.compares() or self.term.activations


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
        ConfigError: two terms are of the same class, so their figures would have the same names; all weights
            are 0; none reaches all weights until the end; or a local term is not the only one.
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
        if not any(each.weight for each in self.terms):
            raise ConfigError("terms: weight: 0 given to every term, so nothing trains. Give one above 0.")
        ends = {each.until for each in self.terms if each.weight}
        if 1 not in ends or (len(ends) > 1 and all(each.inner for each in self.terms)):
            raise ConfigError(
                "terms: none with a weight above 0 reaches all weights until the end. Give "
                "model.distillation, or another term on the logits, with until: 1."
            )
        if self.local and len(names) > 1:
            raise ConfigError(
                f"terms: a local term ends every gradient between two layers, so that {' and '.join(names)} "
                f"cannot be one loss. Give it alone, with model.distillation null, or set its local to false."
            )
        divergences = (each.term for each in self.terms if isinstance(each.term, Distillation))
        self.distillation = next(divergences, Distillation())

    def at(self, done: float) -> Objective:
        """Return the loss when a share ``done`` of the run is over: without the terms that count no more."""
        left = copy(self)
        left.terms = [each for each in self.terms if done < each.until or each.until == 1]
        return left

    def pairs(self, mask: Mask) -> tuple[Pair, ...]:
        """Return, each once, the pairs (student's layer, parent's layer) whose streams some term compares."""
        return tuple(dict.fromkeys(pair for each in self.terms for pair in each.term.pairs(mask)))

    @property
    def timed(self) -> bool:
        """Whether some term counts for a part of the run only."""
        return any(each.until < 1 for each in self.terms)

    @property
    def local(self) -> bool:
        """Whether gradients stay within the layers that are compared."""
        return any(each.term.local for each in self.terms)

    @property
    def activations(self) -> bool:
        """Whether some term reads what the student's feed-forwards compute."""
        return any(each.term.activations for each in self.terms)

    def measured(self, step: Step) -> dict[str, Tensor]:
        """Return, by name, the figures of the terms that read activations: these describe the model."""
        reading = (each.term for each in self.terms if each.term.activations)
        return {key: x for term in reading for key, x in term.loss(step).items() if key != "loss"}

    def __call__(self, step: Step) -> dict[str, Tensor]:
        """Return the weighted sum under ``loss``, and the figures of every term by name, without gradient."""
        out: dict[str, Tensor] = {}
        total: Tensor | None = None
        for each in self.terms:
            with torch.set_grad_enabled(each.weight > 0 and torch.is_grad_enabled()):
                figures = each.term.loss(step)
            value = figures.pop("loss")
            out |= figures
            if each.weight:
                value = value if each.weight == 1 else value * each.weight
                total = value if total is None else total + value
        assert total is not None, "some weight is above 0"
        return {"loss": total, **out}
