"""Say how much a run removes in its course, and which units stay after a part of that.

Units are numbered as the parent's throughout. Shapes: U units, L layers, W units of width in each layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor
from transformers import PretrainedConfig

from src.errors import ConfigError
from src.mask import Mask, Unit, git_sha
from src.models.constraints import Constraints, constraints
from src.models.layers import num_layers
from src.models.loading import load_config
from src.units.amount import Amount
from src.units.importance import centred, sparsities
from src.units.kinds import KINDS, width_of
from src.units.spaces import Kept
from src.units.width import Width


@dataclass(frozen=True)
class Goal:
    """Holds a model from which units go a few at a time.

    Attributes:
        whole: mask that keeps all units.
        remove: how many go in the end: layers; as many attentions and feed-forwards; or, of KV groups and
            channels, as many from each layer.
        limits: which layers cannot go.
        config: of the model.
        width: where its KV groups or channels lie, if these are removed.
    """

    whole: Mask
    remove: int
    limits: Constraints
    config: PretrainedConfig
    width: Width | None = None

    @classmethod
    def of(
        cls, model: str, revision: str | None, mask: str | None, unit: Unit, remove: int | None,
        ratio: float | None,
    ) -> Goal:  # fmt: skip
        """Return the goal for a model; one of ``mask``, ``remove`` and ``ratio`` says how much goes.

        Args:
            model: Hub id or directory.
            revision: its Hub revision.
            mask: path of a mask, of which the kind of unit and their number are taken.
            unit: kind of unit, if no mask is given.
            remove: number that goes.
            ratio: the same as a share.

        Raises:
            ConfigError: not exactly one of the three is given, or the model cannot lose so many.
        """
        if sum(value is not None for value in (mask, remove, ratio)) != 1:
            raise ConfigError(
                "give exactly one of model.mask (of which the number is taken), model.remove (a count) and "
                "model.ratio (a share); set the others to null."
            )
        config = load_config(model, revision)
        given, layers = mask and Mask.load(mask), num_layers(config)
        unit = given.unit if given else unit
        width = width_of(config, unit)
        every = width.count if width else layers
        if given:
            given.check(layers, model)
            if width:
                width.check(given)
            remove = every - (len(given.by_layer[0]) if width else given.depth)
        remove = Amount(remove, ratio).of(config, width=width)[0].remove
        limits = Constraints() if width else constraints(config)
        most = min(every - 1, every - len(limits.pinned(layers, remove)))
        if not 0 < remove <= most:
            raise ConfigError(
                f"model.remove: {remove} of {every} would go; accepted: 1 to {most}. {limits.reason}".strip()
            )
        units = layers * (width.count if width else cast(int, KINDS[unit].each))
        commit = revision or getattr(config, "_commit_hash", None)
        whole = Mask(model, layers, tuple(range(units)), "Interleaved", commit, git_sha=git_sha(), unit=unit,
                     width=width.count if width else None)  # fmt: skip
        return cls(whole, remove, limits, config, width)

    def best(self, kept: Kept, scores_U: Tensor, share: float) -> Kept:
        """Return the layers or halves of ``kept`` that stay when a share of all that is to go has gone.

        Args:
            kept: units that are there.
            scores_U: how much each of these matters.
            share: in (0, 1].
        """
        layers, gone = self.whole.num_layers, round(self.remove * share)
        kind, pinned = KINDS[self.whole.unit], self.limits.pinned(layers, self.remove)
        each, pinned = cast(int, kind.each), pinned | self.limits.pinned(layers, gone)
        held = (at for at, unit in enumerate(kept) if unit // each in pinned)
        space = kind.spaces(len(kept), each * (layers - gone), held)
        return tuple(kept[at] for at in space.argmax(scores_U).nonzero().flatten().tolist())

    def narrower(self, kept: Kept, scores_U: Tensor, bi_L: Tensor, share: float, amplitude: float) -> Kept:
        """Return the KV groups or channels of ``kept`` that stay when a share of all has gone.

        Layers lose different numbers (:func:`src.units.importance.sparsities`), in the end all the same.

        Args:
            kept: units that are there.
            scores_U: how much each of the parent's units matters within its layer; those that are gone count
                for nothing.
            bi_L: block influence of each layer.
            share: in (0, 1].
            amplitude: how unequal the layers' numbers are.
        """
        width = cast(int, self.whole.width)
        scores_LW = scores_U.clone().index_fill(0, torch.tensor(self.gone(kept), dtype=torch.long), -1.0)
        scores_LW = scores_LW.view(-1, width)
        before_L = (scores_LW < 0).double().mean(1)
        most = self.remove / width
        lost_L = sparsities(before_L, centred(bi_L), most * share, amplitude, most)
        counts = (lost_L * width).round().long().tolist()
        order_LW = scores_LW.argsort(stable=True)
        gone = {layer * width + int(u) for layer, n in enumerate(counts) for u in order_LW[layer, :n]}
        return tuple(unit for unit in kept if unit not in gone)

    def less_one_layer(self) -> Iterator[Mask]:
        """Yield the masks without one layer that may go; none where parts of all layers go."""
        each, pinned = KINDS[self.whole.unit].each, self.limits.pinned(self.whole.num_layers, self.remove)
        for layer in {*range(self.whole.num_layers)} - pinned if each else ():
            yield replace(self.whole, keep=tuple(u for u in self.whole.keep if u // cast(int, each) != layer))

    def gone(self, kept: Kept) -> list[int]:
        """Return the units that are not kept."""
        return sorted({*self.whole.keep} - {*kept})

    def shape(self, kept: Kept, there: Kept) -> Mask:
        """Return the mask of the smallest cut that holds ``kept`` and that a config can describe.

        Of width all layers are as wide as the widest; a narrower one is filled up with units that are gone.

        Args:
            kept: units that stay.
            there: units that may fill up.
        """
        if (width := self.width) is None:
            return replace(self.whole, keep=kept)
        own: list[list[int]] = [[] for _ in range(self.whole.num_layers)]
        spare: list[list[int]] = [[] for _ in own]
        stays = {*kept}
        for unit in there:
            (own if unit in stays else spare)[unit // width.count].append(unit)
        widest, most = max(map(len, own)), len(there) // len(own)
        count = next(
            n for n in range(widest, most + 1) if n == most or not width.counted.refusal(self.config, n)
        )
        filled = (sorted([*mine, *rest[: count - len(mine)]]) for mine, rest in zip(own, spare, strict=True))
        return replace(self.whole, keep=tuple(unit for layer in filled for unit in layer))
