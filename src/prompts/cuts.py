"""Which cuts prompts learn to repair: that of a mask, or of masks that are drawn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PretrainedConfig, PreTrainedModel

from src.errors import ConfigError
from src.mask import Mask
from src.models.constraints import constraints
from src.models.layers import num_layers
from src.prompts.tiny import TinyRepair
from src.units.spaces import AnyOf

JUDGES = 2
"""Drawn masks by which prompts are judged."""
_JUDGES_FROM = 2**40


def seeded(seed: int, number: int) -> torch.Generator:
    """Return a generator that depends on (seed, number) only."""
    return torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)


class OneCut:
    """The cut of one mask, at every step."""

    def __init__(self, mask: Mask) -> None:
        self.mask = mask
        self.repairs = list[TinyRepair]()

    def adopt(self, parent: PreTrainedModel) -> None:
        """Cut the parent, which is on its device.

        Raises:
            ConfigError: the mask leaves no gap, or the family cannot express it.
        """
        self.repairs = [TinyRepair(parent, self.mask)]

    def at(self, step: int) -> TinyRepair:
        """Return the repair that prompts train at a step."""
        return self.repairs[0]

    def judges(self) -> Sequence[TinyRepair]:
        """Return the repairs by which prompts are judged, the same ones each time."""
        return self.repairs


class DrawnCuts(OneCut):
    """The cut of a mask of whole layers that is drawn for each step; the first and the last layer stay.

    Args:
        name: of the parent.
        config: the parent's.
        remove: number of layers that a mask removes.
        seed: of the draws.

    Raises:
        ConfigError: so many layers cannot go.
    """

    def __init__(self, name: str, config: PretrainedConfig, remove: int, seed: int) -> None:
        layers = num_layers(config)
        pinned = {0, layers - 1, *constraints(config).pinned(layers, remove)}
        if remove > layers - len(pinned):
            raise ConfigError(
                f"model.remove: {remove} given; of the {layers} layers of '{name}' at most "
                f"{layers - len(pinned)} can go, all between the first and the last."
            )
        self.name, self.seed = name, seed
        self.space = AnyOf(layers, layers - remove, pinned)

    def adopt(self, parent: PreTrainedModel) -> None:
        """Keep the parent, of which cuts are made."""
        self.parent = parent

    def at(self, step: int) -> TinyRepair:
        return TinyRepair(self.parent, self.drawn(step))

    def judges(self) -> Sequence[TinyRepair]:
        return [self.at(_JUDGES_FROM + number) for number in range(JUDGES)]

    def drawn(self, number: int) -> Mask:
        """Return the mask of a number, each legal one equally likely; it depends on (seed, number) only."""
        scores = torch.rand(self.space.units, generator=seeded(self.seed, number), dtype=torch.float64)
        return Mask.by_hand(
            self.name, self.space.units, self.space.argmax(scores).nonzero().flatten().tolist()
        )
