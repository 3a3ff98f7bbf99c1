"""Find which layers of a model cannot go, before a search draws a mask.

A family builds some layers from their position, or lets layers use what others compute. Its config cannot
express every cut then, and an export of such a mask would compute something else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PretrainedConfig

from src.errors import ConfigError
from src.models.cut_config import kept_config, layer_list, weightless
from src.models.cut_rules import attention_layers, forbidden, lenders
from src.models.layers import decoder_layers, num_layers, text_config
from src.models.structure import Sources, alike, structural_changes


@dataclass(frozen=True)
class Constraints:
    """What a mask must respect so that a model of the same class can be the cut model.

    Attributes:
        always_keep: layers that must stay, whatever else goes.
        tail_only: only the last layers may go, because each layer's function depends on its position.
        period: when above 1, layers may also go in whole blocks ``[b * period, (b + 1) * period)``.
        one_of: groups of layers, at least one of each of which must stay.
        reason: why, for a person; empty when every mask is legal.
    """

    always_keep: frozenset[int] = frozenset()
    tail_only: bool = False
    period: int = 1
    one_of: tuple[frozenset[int], ...] = ()
    reason: str = ""

    def pinned(self, length: int, remove: int) -> frozenset[int]:
        """Return layers to pin so that every mask that removes ``remove`` of the others is legal.

        Masks that remove pinned layers may be legal too (whole blocks, another layer of a group); a search
        does without these.

        Args:
            length: number of layers of the model.
            remove: how many of them go.
        """
        pinned = self.always_keep
        if self.tail_only:
            pinned |= frozenset(range(length - remove))
        for group in self.one_of:
            if not group & pinned and len(group) <= remove:
                pinned |= {min(group)}
        return pinned


def constraints(config: PretrainedConfig) -> Constraints:
    """Return what a mask of a model must respect, found by cutting copies of the model without weights.

    One layer of each kind, both ends and the whole tail are taken out in turn, and the layers that are left
    are compared with their originals. Where no kind can go without changing another layer, the layers compute
    with their positions: only the tail can go, or blocks of a period, which is looked for.
    """
    length, lent, attend = num_layers(config), lenders(config), attention_layers(config)
    if why := forbidden(config):
        return Constraints(frozenset(range(length)), reason=f"This '{config.model_type}' {why}.")
    path, layers = decoder_layers(weightless(config))

    def changes(removed: Iterable[int]) -> str:
        keep = [i for i in range(length) if i not in set(removed)]
        try:
            cut_layers = layer_list(weightless(kept_config(config, keep)), path)
        except ConfigError as e:
            return str(e)
        return next(iter(structural_changes(layers, cut_layers, Sources(keep, keep)).values()), "")

    kinds = [kind - lent.keys() - {length - 1} for kind in alike(layers)]
    probes = {min(kind, key=lambda i: abs(i - length // 2)): kind for kind in kinds if kind}
    fixed = {probe: why for probe in probes if (why := changes([probe]))}
    reasons = [f"Layers {sorted(lent)} must stay: others use what they compute."] if lent else []
    if attend:
        reasons.append(f"One or more of the attention layers {sorted(attend)} must stay.")
    if fixed.keys() == probes.keys() and not changes([length - 1]):
        period = next((p for p in range(2, length // 2 + 1) if not changes(range(p, 2 * p))), 1)
        blocks = f", or whole aligned blocks of {period}," if period > 1 else ""
        why = next(iter(fixed.values()))
        reasons.append(f"Only the last layers{blocks} can be removed: {why}")
        return Constraints(frozenset(lent), True, period, (attend,) if attend else (), " ".join(reasons))
    stay = {i: why for probe, why in fixed.items() for i in probes[probe]}
    tail = set(range(length // 2, length)) - lent.keys() - stay.keys()
    for edge, removed in ((0, {0}), (length - 1, {length - 1}), (length - 1, tail)):
        if edge not in stay and (why := changes(removed)):
            stay[edge] = why
    if stay:
        reasons.append(f"Layers {sorted(stay)} must stay: {next(iter(stay.values()))}")
    one_of = [attend] if attend else []
    for kind in _types(config) - {attend}:
        if not kind & ({*lent, *stay} | attend) and (why := changes(kind)):
            one_of.append(kind)
            reasons.append(f"One or more of {sorted(kind)} must stay: {why}")
    return Constraints(frozenset({*lent, *stay}), one_of=tuple(one_of), reason=" ".join(reasons))


def _types(config: PretrainedConfig) -> set[frozenset[int]]:
    """Return the layers of each of the config's layer types; empty where there is one type."""
    types = getattr(text_config(config), "layer_types", None) or []
    kinds = {frozenset(i for i, other in enumerate(types) if other == kind) for kind in types}
    return kinds if len(kinds) > 1 else set()
