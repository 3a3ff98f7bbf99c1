"""Choose the final mask of a search: the best of the policy's last masks, improved by swaps of units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from src.policies.base import MaskPolicy
from src.policies.measuring import Probe
from src.policies.random_search import best_of
from src.policies.swaps import Measure, gains, successor
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


def polish(kept: Kept, space: Space, measure: Measure, swaps: int = 64, finalists: int = 8) -> Kept:
    """Replace a mask by its best neighbour (one swap) for as long as that lowers its divergence.

    A round has two stages, because a deep model has many swaps (768 where 16 of 64 layers go). First, swaps
    are measured on the quick rows, a part of all rows; of too many those whose units promise most alone
    (:func:`gains`). Then the best of these are measured on all rows, and the one of lowest divergence is
    taken. Divergence is heavy-tailed over rows: a few rows are enough to drop bad masks, but not to rank good
    ones.

    Args:
        kept: kept units to start from.
        space: defines the neighbours of a mask.
        measure: divergences of masks, on all rows or on the quick ones.
        swaps: swaps of each round that are measured on the quick rows. If there are more, half as many are,
            and each unit alone; of more than twice so many units in the first round only.
        finalists: swaps of each round that are measured on all rows.

    Returns:
        The kept units of the first mask that none of its finalists improves on.
    """
    gain = dict[int, float]()

    def loss(swap: Kept) -> float:
        return sum(gain[out] for out in {*kept} - {*swap}) - sum(gain[back] for back in {*swap} - {*kept})

    def better() -> Kept:
        others = list(space.neighbours(kept))
        if len(others) > swaps:
            if len(gain) <= 2 * swaps:
                gain.update(gains(kept, others, measure))
            others = sorted(others, key=loss)[: swaps // 2]
        return successor(kept, others, measure, finalists)

    while (best := better()) != kept:
        kept = best
    return kept
