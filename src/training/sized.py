"""The base of a stage that removes units of its model: the settings that say which, and how many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from lightning.pytorch.utilities import rank_zero_info

from src.errors import ConfigError
from src.mask import WIDE, Unit
from src.models.constraints import Constraints, constraints
from src.models.layers import num_layers
from src.models.loading import load_config, numbers
from src.ranges import checked, inside_unit
from src.training.stage import Stage
from src.units.amount import Amount
from src.units.kinds import width_of
from src.units.targets import Target


class Sized(Stage):
    """A stage that removes units: one of ``remove``, ``ratio``, ``budgets`` and ``target`` says how many.

    The other three are None.

    Args:
        model: Hub id or directory of the model to shorten.
        unit: kind of what is removed; see :class:`src.search.MaskSearch`.
        remove: number of layers to remove; of attentions and as many feed-forwards, if halves are removed;
            of KV groups or channels in each layer, if these are.
        ratio: the same number as a share, in (0, 1), rounded to the nearest count.
        budgets: several such shares: one search ends with a mask for each.
        nested: with ``budgets``, whether a smaller removal removes only units that the larger ones remove
            too. The largest is chosen first, and each smaller one keeps all that it keeps.
        target: what the cut model must reach with the fewest layers removed: ``{speedup: 1.3}``,
            ``{parameters: 1.2e9}`` or ``{memory_gib: 6}``.
        kwargs: how the one copy of the weights is loaded; see :class:`src.training.stage.Stage`.
    """

    @checked
    def __init__(
        self,
        model: str,
        unit: Unit = "layer",
        remove: int | None = None,
        ratio: Annotated[float, inside_unit] | None = None,
        budgets: Sequence[float] | None = None,
        nested: bool = False,
        target: Target | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        config = load_config(model, self.revision)
        self.commit: str | None = getattr(config, "_commit_hash", None)
        """Revision of the Hub that was loaded, by which mask and card pin the parent."""
        self.unit, self.num_layers, width = unit, num_layers(config), width_of(config, unit)
        self.width = None if width is None else width.count
        """Units in each layer, where parts of its width are removed."""
        self.limits = constraints(config) if width is None else Constraints()
        stored = getattr(torch, numbers(model, "auto", self.revision))
        self.budgets = Amount(remove, ratio, budgets, target).of(config, stored, width)
        """What is removed, the smallest removal first; one search ends with a mask for each."""
        if told := self.budgets[0].told:
            rank_zero_info(told)
        self.nested = nested
        if nested and self.width:
            raise ConfigError(
                f"model.nested: masks of {WIDE[unit]} are chosen apart. Set it to false, or model.unit to "
                f"layer."
            )
        if nested and budgets is None:
            raise ConfigError(
                "model.nested: true given; it orders the masks of model.budgets. Set these too."
            )
