"""Find the number of layers whose removal makes a model as fast, or as small, as is asked.

The cost of a cut is counted on models without weights. Where layers differ in cost, the removed ones are
spread evenly over the model; the mask that a search then finds may cost more or less.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from transformers import PretrainedConfig

from src.errors import ConfigError
from src.mask import WIDE
from src.models.constraints import Constraints
from src.models.costs import decode_flops, parameters_of
from src.models.cut_config import kept_config, weightless
from src.models.layers import decoder_layers, num_layers
from src.models.structure import alike
from src.units.width import Width

GIB = 1 << 30
SHOWN = {
    "speedup": "ideal {:.3g}x",
    "parameters": "{:,.0f} parameters",
    "memory_gib": "{:.3g} GiB of weights",
}


@dataclass(frozen=True)
class Target:
    """What a cut model must reach; exactly one of these is given.

    Attributes:
        speedup: how many times fewer floating-point operations a decoded token takes, above 1; what
            ``benchmark`` calls ideal.
        parameters: largest number of weights that the cut model may have.
        memory_gib: largest size of these weights in GiB, in the type that the parent's have.
    """

    speedup: float | None = None
    parameters: float | None = None
    memory_gib: float | None = None

    def resolve(
        self, config: PretrainedConfig, limits: Constraints, stored: torch.dtype, width: Width | None = None
    ) -> tuple[int, str]:
        """Return the smallest number of layers to remove that reaches the target, and a line that says so.

        Args:
            config: of the parent.
            limits: which layers its family lets go.
            stored: type of the parent's weights, by which ``memory_gib`` counts.
            width: where KV groups or channels lie: then the number to remove from each layer is found. None
                removes layers.

        Raises:
            ConfigError: not exactly one target is given, or no number of layers reaches it.
        """
        given: dict[str, float] = {key: value for key, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ConfigError(f"model.target: {given} given; accepted: exactly one of {', '.join(SHOWN)}.")
        ((key, asked),) = given.items()

        def held(remove: int) -> int:
            """Return the least number from ``remove`` on that a config of this class can hold."""
            counts = range(remove, every)
            return next(n for n in counts if width is None or not width.counted.refusal(config, every - n))

        def without(remove: int) -> PretrainedConfig:
            if width is not None:
                return width.counted.config(config, every - held(remove))
            removed = spread(limits, every, remove)
            return kept_config(config, [i for i in range(every) if i not in removed])

        @cache
        def cost(remove: int) -> float:
            cut = without(remove) if remove else config
            if key == "speedup":
                return decode_flops(cut)
            return parameters_of(cut) * (1 if key == "parameters" else stored.itemsize / GIB)

        def reached(remove: int) -> float:
            return cost(0) / cost(remove) if key == "speedup" else cost(remove)

        def enough(remove: int) -> bool:
            return reached(remove) >= asked if key == "speedup" else reached(remove) <= asked

        every = num_layers(config) if width is None else width.count
        of = f"{every} {'layers' if width is None else f'{WIDE[width.unit]} of each layer'}"
        fits = (n for n in range(1, every) if width or every - len(limits.pinned(every, n)) >= n)
        counts = range(1, 1 + max(fits, default=0))
        rising = width is not None or _uniform(config)  # if not, some count may reach less than one before it
        remove = None if enough(0) else _first(counts, enough, rising)
        if remove is None:
            shown = counts[:: max(1, len(counts) - 1)] if rising or enough(0) else counts
            ends = [SHOWN[key].format(end) for end in sorted(map(reached, shown), reverse=key != "speedup")]
            reach = f"{ends[0]} to {ends[-1]}, without 1 to {len(counts)} of {of}" if ends else "nothing"
            whole = SHOWN[key].format(reached(0))
            fault = f"model.target: {key} {asked:g} asked of a model of {whole}; in reach: {reach}."
            raise ConfigError(f"{fault} {limits.reason}".strip())
        remove = held(remove)
        told = SHOWN[key].format(reached(remove))
        return remove, f"target {key} {asked:g}: removes {remove} of {of} ({told})"


def _uniform(config: PretrainedConfig) -> bool:
    """Return whether the layers of a model differ in their weights alone, so that all cost the same."""
    return len(alike(decoder_layers(weightless(config))[1])) == 1


def _first(counts: Sequence[int], enough: Callable[[int], bool], rising: bool) -> int | None:
    """Return the first count that is enough, or None; where ``rising``, all behind one that is are too."""
    if rising:
        counts = counts[bisect_left(counts, True, key=enough) :][:1]
    return next(filter(enough, counts), None)


def spread(limits: Constraints, layers: int, remove: int) -> set[int]:
    """Return ``remove`` of the layers that may go, as far from each other as can be."""
    free = sorted(set(range(layers)) - limits.pinned(layers, remove))
    return {free[int((i + 0.5) * len(free) / remove)] for i in range(min(remove, len(free)))}
