"""Choose the final mask of a search: the best of the policy's last masks, improved by swaps of units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from src.policies.base import MaskPolicy
from src.policies.measuring import Probe
from src.policies.polish import polish
from src.policies.random_search import best_of
from src.policies.swaps import Measure
from src.units.spaces import Kept, Space


def settle(policy: MaskPolicy, probe: Probe, recent: Sequence[Kept]) -> tuple[Kept, dict[str, float]]:
    """Choose the search's final mask on held-out rows, among what the policy allows.

    The policy's ``candidates`` says how many recent masks compete, beside its first. With ``polish``,
    starting points that its space knows compete too, and the best is improved by swaps
    (:func:`polished`).

    Args:
        policy: the policy at the end of its run.
        probe: measures masks.
        recent: distinct masks that the policy hardened to, besides its present one, which competes too.

    Returns:
        The kept units, and the figures of a mask file: the divergences of the chosen mask, of the learned
        one, of the best candidate and of the soft gates (keep probabilities).
    """

    def measure(masks: Sequence[Kept], quick: bool = False) -> list[float]:
        about = "swaps, on a part of the rows" if quick else "best masks, on all rows"
        return probe.walk([policy.gates(kept) for kept in masks], about, quick=quick)

    learned = policy.harden()
    assert policy.space.legal(learned), "a policy must harden to a set of its space"
    soft = probe.divergence(policy.keep_probabilities().to(policy.logits))

    competing = [*reversed(recent), learned]
    if policy.polish:
        competing += policy.space.starts(torch.tensor(policy.worth()))
    divergences = dict(zip(competing, measure(competing), strict=True))
    best = best_of(competing, [divergences[kept] for kept in competing])
    chosen = polished(policy.space, divergences, measure) if policy.polish else best
    kl, kl_learned, kl_best = measure([chosen, learned, best])
    return chosen, {
        "kl": kl,
        "kl_learned": kl_learned,
        "kl_best_candidate": kl_best,
        "kl_soft": soft,
        "hard_soft_gap": kl_learned - soft,
    }


def polished(space: Space, divergences: Mapping[Kept, float], measure: Measure) -> Kept:
    """Polish the best of some masks. Of halves, the best that is whole layers is first polished as such.

    From one mask of whole layers to another lead many swaps of halves, most of which are worse than both.

    Args:
        space: of the masks.
        divergences: of each mask, on all rows.
        measure: divergences of masks, on all rows or on the quick ones.
    """
    known = dict(divergences)
    if whole := space.layerwise():
        halves = whole.halves

        def layerwise(masks: Sequence[Kept], quick: bool) -> Sequence[float]:
            return measure([halves(layers) for layers in masks], quick)

        among = {layers: known[kept] for kept in known if (layers := whole.layers(kept)) is not None}
        if among:
            end = polish(best_of([*among], [*among.values()]), whole.space, layerwise)
            known[halves(end)] = measure([halves(end)], False)[0]
    return polish(best_of([*known], [*known.values()]), space, measure)
