"""Laws of the gradient-weighted score with two thresholds: by hand, against full autograd, on any space."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from src.models.layers import decoder_layers
from src.models.loading import load_model
from src.plan.work import calibration
from src.policies import PruneMerge
from src.policies.measuring import Measure, Probe
from src.policies.scores import salience
from src.search import MaskSearch
from src.units.spaces import Kept
from tests.numerics.test_probe import BATCHES, batches, probe_of
from tests.planning import L, write_config


class Fake(Probe):
    """A probe with given gradients of the gates, and a cost for each set of missing units."""

    def __init__(self, grads_BU: Sequence[Sequence[float]], costs: dict[Kept, float] | None = None) -> None:
        self.grads, self.costs = torch.tensor(grads_BU, dtype=torch.float64), costs or {}
        self.asked: list[Kept] = []

    def gate_gradients(self) -> Tensor:
        return self.grads

    def walk(
        self, masks: Sequence[Tensor], about: str, by: Measure = "divergence", quick: bool = False
    ) -> list[float]:
        assert quick
        self.asked += [tuple((gates_U == 0).nonzero().flatten().tolist()) for gates_U in masks]
        return [self.costs[gone] for gone in self.asked]


def removed(policy: PruneMerge, probe: Probe, layers: int, remove: int) -> set[int]:
    policy.setup(layers, remove)
    policy.initialise(probe)
    return set(range(layers)) - set(policy.harden())


SCORES = [9.0, 1.0, 8.0, 3.0, 2.0, 4.0, 5.0, 7.0, 6.0, 10.0]
"""Of ten layers: 1 and 4 score lowest, then 3, 5, 6, 8."""


def test_signs_cancel_within_a_batch_and_not_between_batches() -> None:
    """Two batches whose gradients are opposite are as loud as two that agree."""
    probe = Fake([[3.0, -1.0, 0.5, 2.0], [-3.0, 1.0, 0.5, -0.5]])
    torch.testing.assert_close(salience(probe, 4).double(), torch.tensor([3.0, 1.0, 0.5, 1.25]).double())
    assert removed(PruneMerge(prune=0.5), probe, 4, 2) == {1, 2}


def test_the_thresholds_decide_outside_and_a_measurement_between_them() -> None:
    costs = {(1, 3, 4): 5.0, (1, 4, 5): 1.0, (1, 4, 6): 4.0, (1, 4, 8): 2.0}
    probe, policy = Fake([SCORES], costs), PruneMerge(prune=0.2, keep=0.4)
    assert removed(policy, probe, 10, 4) == {1, 4, 5, 8}
    assert probe.asked == [(1, 3, 4), (1, 4, 5), (1, 4, 6), (1, 4, 8)], "each, beside those that are pruned"
    # The order in which units go: pruned by score, measured ones by cost, the others by score.
    assert sorted(range(10), key=policy.logits.tolist().__getitem__) == [1, 4, 5, 8, 6, 3, 7, 2, 0, 9]


def test_a_unit_without_which_there_is_no_number_goes_last_of_those_between() -> None:
    costs = {(1, 3, 4): float("nan"), (1, 4, 5): 1.0, (1, 4, 6): 4.0, (1, 4, 8): 2.0}
    assert removed(PruneMerge(prune=0.2, keep=0.4), Fake([SCORES], costs), 10, 5) == {1, 4, 5, 6, 8}


@pytest.mark.parametrize(("prune", "keep"), [(0.4, 0.0), (1.0, 0.0), (0.0, 0.6), (0.2, 1.0), (1.0, 1.0)])
def test_where_nothing_is_left_between_the_score_alone_decides(prune: float, keep: float) -> None:
    probe = Fake([SCORES])
    assert removed(PruneMerge(prune=prune, keep=keep), probe, 10, 4) == {1, 3, 4, 5}
    assert probe.asked == []


def test_without_thresholds_every_layer_that_may_go_is_measured_alone() -> None:
    costs = {(i,): float((7 * i) % 10) for i in range(10)}
    policy = PruneMerge(prune=0.0, keep=0.0, always_keep=[0, 4])
    probe = Fake([SCORES], costs)
    assert removed(policy, probe, 10, 3) == {3, 6, 9}, "of costs 1, 2 and 3"
    assert sorted(probe.asked) == [(i,) for i in range(10) if i not in (0, 4)]


def test_of_halves_the_legal_mask_of_the_latest_places_stays() -> None:
    scores = torch.rand(12, generator=torch.Generator().manual_seed(0)).tolist()
    policy = PruneMerge(prune=1.0)
    policy.setup(6, 2, unit="half")
    policy.initialise(Fake([scores]))
    place = sorted(range(12), key=scores.__getitem__).index
    best = max(policy.space, key=lambda kept: sum(map(place, kept)))
    assert policy.harden() == best


def test_the_score_is_the_gradient_of_a_layers_share_of_the_stream(teacher_dir: str) -> None:
    """At open gates ``dL/dg`` is ``<dL/dh', F(h) - h>``, summed over a batch before the absolute value."""
    probe = probe_of(teacher_dir, PruneMerge(), "layer", 0.0)
    found = salience(probe, 6)
    model = load_model(teacher_dir)
    layers, total, apart = decoder_layers(model)[1], torch.zeros(6), torch.zeros(6)
    seen: list[tuple[Tensor, Tensor]] = []
    for layer in layers:
        layer.register_forward_hook(lambda _, args, out: (out.retain_grad(), seen.append((args[0], out)))[0])
    for batch in batches():
        seen.clear()
        model(**batch).loss.backward()
        for i, (h_in, h_out) in enumerate(seen):
            assert h_out.grad is not None
            each = (h_out.grad * (h_out - h_in)).detach()
            total[i] += each.sum().abs() / BATCHES
            apart[i] += each.sum(-1).abs().sum() / BATCHES
    torch.testing.assert_close(found.float(), total, rtol=1e-4, atol=1e-6)
    assert (apart > 1.2 * total).any(), "signs of tokens cancel"


def test_a_plan_counts_both_ways_and_the_units_between(tmp_path: Path) -> None:
    model, rows = write_config(tmp_path / "model.json"), 8

    def passes(prune: float, keep: float) -> float | None:
        policy = PruneMerge(prune=prune, keep=keep)
        return calibration(MaskSearch(model, policy, calibration_batches=rows, remove=1), 0)

    there_and_back, end = 2 * rows, rows + rows * (L - 1) / L
    assert passes(1.0, 0.0) == pytest.approx(there_and_back + end)
    quick = 2 + L * 2 * (L - 1) / L  # the signals, and each layer closed alone, on a quarter of the rows
    assert passes(0.0, 0.0) == pytest.approx(there_and_back + quick + end)
