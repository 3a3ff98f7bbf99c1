"""Say how much of a model a search removes: a count, a share, several shares, or enough for a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from transformers import PretrainedConfig

from src.errors import ConfigError
from src.mask import WIDE
from src.models.constraints import Constraints, constraints
from src.models.layers import num_layers
from src.units.narrower import try_narrower
from src.units.targets import Target
from src.units.width import Width


@dataclass(frozen=True, order=True)
class Budget:
    """How much one mask removes; a search learns one mask for each of its budgets.

    Attributes:
        remove: number of layers. Of halves, as many attentions and as many feed-forwards; of KV groups or
            channels, as many from each layer.
        share: the entry of ``budgets`` that asks for it; None in a search for one mask.
        told: which target it reaches and how far, in words; empty without a target.
    """

    remove: int
    share: float | None = None
    told: str = ""

    @property
    def suffix(self) -> str:
        """Ending of the names of this budget's files and figures, such as ``-0.25``; or empty."""
        return "" if self.share is None else f"-{self.share:g}"


@dataclass(frozen=True)
class Amount:
    """The settings that say how much to remove; exactly one of them is given.

    Attributes:
        remove: number of layers (or of what else is removed, see :class:`Budget`).
        ratio: share of the layers, in (0, 1), rounded to the nearest count.
        budgets: several such shares, each of which gets a mask of its own.
        target: speed or size that the cut model must reach; as little as possible is removed.

    Raises:
        ConfigError: not exactly one of them is given, or a share is outside (0, 1).
    """

    remove: int | None = None
    ratio: float | None = None
    budgets: Sequence[float] | None = None
    target: Target | None = None

    def __post_init__(self) -> None:
        if sum(value is not None for value in vars(self).values()) != 1:
            raise ConfigError(
                "give exactly one of model.remove (a count), model.ratio (a share), model.budgets (several "
                "shares) and model.target; set the others to null."
            )
        for key, shares in (("ratio", self.ratio), ("budgets", self.budgets)):
            listed = [shares] if isinstance(shares, float | int) else shares
            if listed is not None and not (listed and all(0 < share < 1 for share in listed)):
                raise ConfigError(
                    f"model.{key}: {shares} given; accepted: above 0 and below 1, such as "
                    f"{0.25 if key == 'ratio' else [0.125, 0.25]}."
                )

    def of(
        self, config: PretrainedConfig, stored: torch.dtype = torch.float32, width: Width | None = None
    ) -> tuple[Budget, ...]:
        """Return the budgets for a model, the smallest removal first; one alone unless ``budgets`` is set.

        Args:
            config: of the model.
            stored: type of its weights, by which a target counts memory.
            width: where its KV groups or channels lie, if these are removed; None if layers or halves are.

        Raises:
            ConfigError: two shares are the same count, the target is out of reach, or the model's class can
                hold no such number of KV groups or channels.
        """
        if self.target is not None:
            limits = Constraints() if width else constraints(config)
            remove, told = self.target.resolve(config, limits, stored, width)
            budgets: tuple[Budget, ...] = (Budget(remove, told=told),)
        else:
            budgets = self._counted(num_layers(config) if width is None else width.count)
        if width is not None:
            for budget in budgets:
                _check_width(config, width, budget.remove)
        return budgets

    def _counted(self, every: int) -> tuple[Budget, ...]:
        if self.budgets is None:
            count = self.remove if self.ratio is None else _count(every, self.ratio)
            assert count is not None
            return (Budget(count),)
        budgets = sorted(Budget(_count(every, share), share) for share in self.budgets)
        for one, other in pairwise(budgets):
            if one.remove == other.remove:
                raise ConfigError(
                    f"model.budgets: {one.share:g} and {other.share:g} both remove {one.remove} of {every}. "
                    f"Give shares that lie further apart."
                )
        return tuple(budgets)


def _check_width(config: PretrainedConfig, width: Width, remove: int) -> None:
    """Refuse a number of units of width that no config of the model's class can hold, or its code run.

    Raises:
        ConfigError: it cannot; the message names the numbers nearby that a config can hold.
        Misfit: as of :func:`src.units.narrower.try_narrower`.
    """
    kept, counted = width.count - remove, width.counted
    if not 0 < kept < width.count:  # the policy refuses it, by name
        return
    if why := counted.refusal(config, kept):
        fewer = next((n for n in range(kept + 1, width.count) if not counted.refusal(config, n)), None)
        more = next((n for n in range(kept - 1, 0, -1) if not counted.refusal(config, n)), None)
        accepted = " or ".join(str(width.count - n) for n in (fewer, more) if n) or "none"
        raise ConfigError(
            f"model.remove: {remove} of {width.count} {WIDE[width.unit]} would go from each layer, but {why} "
            f"Accepted nearby: {accepted}."
        )
    try_narrower(config, width, kept)


def _count(every: int, share: float) -> int:
    return max(1, round(every * share))
