"""Flexiffusion's search, on layers in the place of time steps (arXiv 2506.02488).

*The paper's*: the T steps of a diffusion sampler fall into equal segments. A step is full, partial (the
cached output of a part of the network stands for it) or null (left out); in a segment the full ones come
first. A gene for each segment says how many are which. Genomes evolve by mutation and selection, and their
fitness is relative to the teacher: the Fréchet distance of the samples.
*Ours*: segments of layers, a gene the number of its full layers, repair to the exact budget, and the
divergence of the output as another fitness. A segment may be all null.

*Left out*: partial layers. One that adds the residual of the segment's last full layer once more is that
layer with a gate of 2, and no plain layer computes this: its feed-forward would have to read the stream of
gate 1. A scale of what survives is a repair, which can be fitted.

Shapes: N supervised positions, H hidden.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from src.errors import ConfigError
from src.mask import Unit
from src.policies.measuring import Probe
from src.policies.one_shot import OneShot
from src.ranges import MOST, Count, Natural, Range, Share, checked
from src.training.progress import track
from src.units.spaces import Kept

Genome = tuple[int, ...]
"""Number of full layers of each segment; they are its first ones."""

Moments = tuple[Tensor, Tensor]
"""Mean ``[H]`` and covariance ``[H, H]`` of hidden states, in float64."""


class SegmentEvolution(OneShot):
    """Takes the best mask of a (mu + lambda) evolution in which each segment keeps its first layers.

    The better half of a generation are its elites. They stay, and their mutants fill it up; so the best
    fitness never falls. Forward passes only; no genome is measured twice.

    Args:
        segments: equal runs of layers; lengths differ by one where they do not divide the layers. With as
            many as layers, every mask has a genome.
        fitness: ``divergence`` of the output from the teacher, or ``frechet``, the distance between the
            Gaussians of final hidden states, which takes H cubed operations for each mask.
        population: genomes of a generation, mu + lambda.
        generations: how often mutants are made.
        mutation: chance of each gene to be drawn anew in a mutant.
        kwargs: ``always_keep``, ``seed``, ``candidates``, ``polish`` of the base class.
    """

    @checked
    def __init__(
        self,
        segments: Count = 4,
        fitness: Literal["divergence", "frechet"] = "divergence",
        population: Annotated[int, Range(int, 2, MOST)] = 20,
        generations: Natural = 10,
        mutation: Share = 0.2,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.segments, self.fitness = segments, fitness
        self.population, self.generations, self.mutation = population, generations, mutation

    def setup(
        self, num_layers: int, remove: int, pinned: Iterable[int] = (), unit: Unit = "layer", width: int = 1
    ) -> None:
        """Set up as the base class does, and divide the layers into segments.

        Raises:
            ConfigError: as of the base class; there are more segments than layers; or so many layers cannot
                go, because those that stay hold all in front of them in their segment.
        """
        super().setup(num_layers, remove, pinned, unit, width)
        if self.segments > num_layers:
            raise ConfigError(
                f"policy.segments: {self.segments} asked, but the model has {num_layers} layers. Accepted: 1 "
                f"to {num_layers}."
            )
        edges = [num_layers * number // self.segments for number in range(self.segments + 1)]
        self.parts = [range(begin, end) for begin, end in pairwise(edges)]
        stay = self.space.pinned
        self.least = [max((1 + i - part.start for i in part if i in stay), default=0) for part in self.parts]
        if remove > (most := num_layers - sum(self.least)):
            raise ConfigError(
                f"remove: {remove} layers asked, but a segment keeps its first layers, up to the last that "
                f"must stay, and only {most} are left. Remove fewer (model.remove, model.ratio), raise "
                f"policy.segments, shorten policy.always_keep, or choose src.policies.LevelSwitch."
            )

    def score(self, probe: Probe) -> Tensor:
        """Return the best mask's gates ``[L]``: a score of 1 for its layers, 0 for the others."""
        chance, values = random.Random(self.seed), dict[Genome, float]()
        teacher = moments(probe, None) if self.fitness == "frechet" else None

        def elites(genomes: Iterable[Genome]) -> list[Genome]:
            distinct = dict.fromkeys(genomes)
            new = [genome for genome in distinct if genome not in values]
            values.update(zip(new, self.measured(probe, new, teacher), strict=True))
            return sorted(distinct, key=values.__getitem__)[: self.population // 2]

        fittest = elites(self.drawn(chance) for _ in range(self.population))
        for _ in range(self.generations):
            parents = chance.choices(fittest, k=self.population - len(fittest))
            fittest = elites([*fittest, *(self.mutant(parent, chance) for parent in parents)])
        return self.gates(self.kept(fittest[0]))

    # ------------------------------------------------------------------ genomes

    def kept(self, genome: Genome) -> Kept:
        """Return the layers that a genome keeps."""
        return tuple(layer for part, full in zip(self.parts, genome, strict=True) for layer in part[:full])

    def gene(self, segment: int, chance: random.Random) -> int:
        """Return a random number of full layers of a segment."""
        return chance.randint(self.least[segment], len(self.parts[segment]))

    def drawn(self, chance: random.Random) -> Genome:
        """Return a random genome of the budget."""
        return self.repaired((self.gene(segment, chance) for segment in range(self.segments)), chance)

    def mutant(self, genome: Genome, chance: random.Random) -> Genome:
        """Return a genome of the budget, of which each gene was drawn anew with the chance ``mutation``."""
        anew = [chance.random() < self.mutation for _ in genome]
        pairs = enumerate(zip(genome, anew, strict=True))
        return self.repaired((self.gene(i, chance) if new else gene for i, (gene, new) in pairs), chance)

    def repaired(self, genes: Iterable[int], chance: random.Random) -> Genome:
        """Return the genes after random ones have moved by one until exactly ``target`` layers are null."""
        full = list(genes)
        while excess := sum(full) - (self.num_layers - self.target):
            step = -1 if excess > 0 else 1
            bounds = zip(full, self.least, self.parts, strict=True)
            free = [i for i, (gene, least, part) in enumerate(bounds) if least <= gene + step <= len(part)]
            full[chance.choice(free)] += step
        return tuple(full)

    # ------------------------------------------------------------------ fitness

    def measured(self, probe: Probe, genomes: Sequence[Genome], teacher: Moments | None) -> list[float]:
        """Return how far each genome's model is from the teacher; infinite where there is no number.

        Args:
            probe: measures masks.
            genomes: are measured in this order.
            teacher: moments of the teacher's states, from which the distance is; None is the divergence.
        """
        masks = [self.gates(self.kept(genome)) for genome in genomes]
        if teacher is None:
            values = probe.walk(masks, "segments")
        else:
            values = [frechet(teacher, moments(probe, gates_L)) for gates_L in track(masks, "segments")]
        return [math.inf if math.isnan(value) else value for value in values]


def moments(probe: Probe, gates_U: Tensor | None) -> Moments:
    """Return the moments of the final hidden states under gates (None: all open) on all ranks' rows."""
    total = torch.zeros((), dtype=torch.float64)
    for hidden_NH in probe.finals(gates_U):
        ones_and_states = pad(hidden_NH.double().cpu(), (1, 0), value=1.0)
        total = total + ones_and_states.T @ ones_and_states
    mean = probe.mean(total, total[0, 0])
    return mean[0, 1:], mean[1:, 1:] - torch.outer(mean[0, 1:], mean[0, 1:])


def frechet(one: Moments, other: Moments) -> float:
    """Return ``|m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))``, NaN where a moment is not finite."""
    (mean_1, cov_1), (mean_2, cov_2) = one, other
    if not (cov_1.isfinite().all() and cov_2.isfinite().all()):
        return math.nan
    values, vectors = torch.linalg.eigh(cov_1)
    root = vectors * values.clamp_min(0).sqrt()  # C_1 = R R^T, and C_1 C_2 has the eigenvalues of R^T C_2 R
    shared = torch.linalg.eigvalsh(root.T @ cov_2 @ root).clamp_min(0).sqrt().sum()
    return float((mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * shared)
