"""End a search: choose one mask of those that a policy learned last, and try swaps of its units."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from src.policies.base import MaskPolicy, Probe
from src.units.spaces import Space

Keep = tuple[int, ...]
Measure = Callable[[Keep, bool], float]


def settle(policy: MaskPolicy, probe: Probe, recent: Sequence[Keep]) -> tuple[Keep, dict[str, float]]:
    """Choose a mask on held-out rows, as far as the policy allows (``candidates``, ``polish``).

    Args:
        policy: at the end of its run.
        probe: measures masks.
        recent: the last distinct masks that the policy hardened to, which compete with its last one.

    Returns:
        The kept units, and the figures of a mask file: divergences of what was chosen, of what was learned,
        of the best candidate, and of the mask while it is soft.
    """

    def measure(keep: Keep, quick: bool = False) -> float:
        return probe.divergence(policy.gates(keep), quick)

    learned = policy.harden()
    assert policy.space.legal(learned), "a policy must harden to a set of its space"
    soft = probe.divergence(policy.keep_probabilities().to(policy.logits))
    best = min([*reversed(recent), learned], key=measure)
    chosen = polish(best, policy.space, measure, policy.worth()) if policy.polish else best
    return chosen, {
        "kl": measure(chosen),
        "kl_learned": measure(learned),
        "kl_best_candidate": measure(best),
        "kl_soft": soft,
        "hard_soft_gap": measure(learned) - soft,
    }


def polish(
    keep: Keep, space: Space, measure: Measure, worth: Sequence[float], swaps: int = 64, finalists: int = 8
) -> Keep:
    """Go to a neighbouring mask, by one swap, while that lowers ``measure``; steepest swap first.

    A deep model has more swaps than are worth a look (768 where 16 of 64 layers go), so those race that the
    search itself finds likeliest. Divergence is heavy-tailed over rows, so a few rows cannot tell good masks
    apart, but they can drop bad ones: the race is run on the quick rows, and only the finalists are measured
    on all of them.

    Args:
        keep: kept units to start from.
        space: says what the neighbours of a mask are.
        measure: what to lower, ``(keep, quick) -> value``.
        worth: of keeping each unit, such as the policy's logits.
        swaps: swaps that race in each round, those that gain most worth first.
        finalists: swaps measured on all rows in each round.
    """

    def loss_of_worth(swap: Keep) -> float:
        return sum(worth[out] for out in {*keep} - {*swap}) - sum(worth[back] for back in {*swap} - {*keep})

    while True:
        racing = sorted(space.neighbours(keep), key=loss_of_worth)[:swaps]
        race = sorted(racing, key=lambda swap: measure(swap, True))[:finalists]
        best = min(race, key=lambda swap: measure(swap, False), default=keep)
        if measure(best, False) >= measure(keep, False):
            return keep
        keep = best
