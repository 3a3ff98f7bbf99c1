"""Laws of a race: who runs, for how long, who wins, and what is counted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from src.policies import GumbelTopK
from src.policies.race import Race
from src.units.spaces import Kept

UNITS, GONE = 8, 3


class Probe(SimpleNamespace):
    """Has measured every mask at the sum of its kept units, which calls the last block the worst."""

    def measured(self) -> dict[tuple[float, ...], float]:
        soft = {(0.5,) * UNITS: 0.0}
        return soft | {tuple(float(u in kept) for u in range(UNITS)): float(sum(kept)) for kept in self.masks}

    def divergence(self, gates_U: torch.Tensor) -> float:
        return float(gates_U.nonzero().sum())


def raced(monkeypatch: pytest.MonkeyPatch, runners: int) -> tuple[Kept, dict[str, float], list[Any], Any]:
    policy = GumbelTopK(init="zeros")
    policy.setup(UNITS, GONE)
    search = SimpleNamespace(forward_tokens=100.0, device=torch.device("cpu"))
    probe, ran = Probe(search=search, masks=list(policy.space)), list[Any]()

    def recovered(self: Race, probe: Any, kept: Kept, taught: Any, steps: int) -> float:
        ran.append((steps, kept))
        search.forward_tokens += steps
        return -float(sum(kept))

    monkeypatch.setattr(Race, "recovered", recovered)
    race = Race(runners=runners, steps=3)
    winner, figures = race(probe, policy, [])
    assert race.batches == max(steps for steps, _ in ran)
    return winner, figures, ran, policy


@pytest.mark.parametrize(("runners", "rounds"), [(8, [8, 4, 2]), (5, [5, 3, 2]), (2, [2])])
def test_each_round_has_half_the_masks_for_twice_the_steps(
    runners: int, rounds: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    winner, figures, ran, _ = raced(monkeypatch, runners)
    expected = [3 * 2**number for number, count in enumerate(rounds) for _ in range(count)]
    assert [steps for steps, _ in ran] == expected
    for number in range(1, len(rounds)):
        before, now = ([kept for steps, kept in ran if steps == 3 * 2**at] for at in (number - 1, number))
        assert now == sorted(before, key=lambda kept: -sum(kept))[: len(now)]
    assert winner == max((kept for _, kept in ran), key=sum)
    assert figures == {
        "kl": float(sum(winner)), "kl_recovered": -float(sum(winner)), "race_forward_tokens": sum(expected),
    }  # fmt: skip


def test_the_best_measured_run_beside_one_contiguous_block(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, ran, policy = raced(monkeypatch, 8)
    field = [kept for steps, kept in ran if steps == 3]
    best = sorted(policy.space, key=sum)
    blocks = [kept for kept in field if len({unit - at for at, unit in enumerate(kept)}) <= 2]
    assert field[:7] == [kept for kept in best if kept != field[7]][:7]
    assert field[7] in blocks
    assert policy.space.legal(field[7])
