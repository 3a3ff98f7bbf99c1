"""EvoPress: evolve one mask by level switches (arXiv 2410.14649, ICML 2025): the plain evolutionary rival.

Each generation makes offspring of one parent. An offspring puts some removed units back and removes as many
others, so all have one size. The best of the offspring replaces the parent if it is better, a (1 + lambda)
evolution. It is found in steps: more tokens for fewer survivors.

*The paper's*: the switch, the number of switches (the lesser of two uniform draws), random masks of which the
best is the first parent, the divergence from the teacher as fitness, the steps of selection. The paper's
units are layers, or attentions and feed-forwards apart, as many of each as may come.
*Ours*: any space of masks, whose neighbours are the switches, so that halves still pair up; two steps, on the
quick and on all calibration rows. These stay the same, where the paper draws tokens anew each time, so no
mask is measured twice.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from src.policies.measuring import Probe
from src.policies.one_shot import OneShot
from src.policies.random_search import best_of
from src.policies.swaps import successor
from src.ranges import Count, Natural, checked
from src.units.spaces import Kept


class LevelSwitch(OneShot):
    """Takes the mask at which an evolution of one parent ends; forward passes only.

    Args:
        generations: how often offspring are made.
        offspring: masks that each generation draws, lambda; equal ones are measured once.
        survivors: offspring of each generation that are measured on all rows.
        switches: most switches between a parent and its offspring.
        initial: random masks, of which the best on the quick rows is the first parent.
        kwargs: ``always_keep``, ``seed``, ``candidates``, ``polish`` of the base class.
    """

    works_on = ("layer", "half", "kv_group")

    @checked
    def __init__(
        self,
        generations: Natural = 16,
        offspring: Count = 16,
        survivors: Count = 2,
        switches: Count = 3,
        initial: Count = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.generations, self.offspring, self.survivors = generations, offspring, survivors
        self.switches, self.initial = switches, initial

    def score(self, probe: Probe) -> Tensor:
        """Return the last parent's gates ``[U]``: a score of 1 for its units, 0 for the others."""

        def measure(masks: Sequence[Kept], quick: bool) -> list[float]:
            return probe.walk([self.gates(kept) for kept in masks], "level switches", quick=quick)

        chance = random.Random(self.seed)
        first = [self.space.uniform(self.generator(0, number)) for number in range(self.initial)]
        parent = best_of(first, measure(first, True))
        for _ in range(self.generations):
            drawn = dict.fromkeys(self.switched(parent, chance) for _ in range(self.offspring))
            others = [kept for kept in drawn if kept != parent]
            parent = successor(parent, others, measure, self.survivors)
        return self.gates(parent)

    def switched(self, kept: Kept, chance: random.Random) -> Kept:
        """Return a mask that is 1 to ``switches`` random switches away, few of them more often."""
        for _ in range(min(chance.randint(1, self.switches), chance.randint(1, self.switches))):
            kept = chance.choice([*self.space.neighbours(kept)] or [kept])
        return kept
