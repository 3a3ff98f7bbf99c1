"""What a plan counts for the measuring of masks, on a toy whose costs are a formula."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from src.mask import Unit
from src.plan.toy import CountingProbe, Toy
from src.plan.work import calibration
from src.policies import Fisher, GumbelTopK
from src.search import MaskSearch
from tests.planning import (
    L,
    write_config,
)


def test_calibration_counts_what_the_policy_asks(tmp_path: Path) -> None:
    rows, model = 8, write_config(tmp_path / "model.json")

    def passes(init: Any, polish: bool = False, streams: int = 0, **keys: Any) -> float:
        policy = GumbelTopK(init=init, candidates=1, polish=polish)
        counted = calibration(MaskSearch(model, policy, calibration_batches=rows, **keys), streams)
        assert counted is not None
        return counted

    signals, soft, hard = rows, rows, rows * (L - 1) / L
    assert passes("zeros", remove=1) == pytest.approx(signals + soft + hard)
    quick = 2 + L * 2 * (L - 1) / L  # the signal, and each layer bypassed, on a quarter of the rows
    assert passes("kl", remove=1) == pytest.approx(signals + quick + soft + hard)
    halves = 2 + 2 * L * 2 * (2 * L - 1) / (2 * L)  # each half: twice as many, each nearly a whole pass
    assert passes("kl", remove=1, unit="half") == pytest.approx(signals + halves + soft + hard)
    shared = 2 + 2 * sum(range(L)) / L  # each begins where the open model's stream is remembered
    after = passes("kl", remove=1, streams=10**6) - signals - shared - soft
    assert after in [pytest.approx(rows * left / L) for left in range(L)], "what lies behind its layer"
    several = {"budgets": [1 / L, 2 / L]}
    both = soft + hard + soft + rows * (L - 2) / L  # of each budget the soft mask and the hard one
    assert passes("kl", **several) == pytest.approx(signals + quick + both)
    assert passes("kl", True, **several, nested=True) < passes("kl", True, **several), "fewer neighbours"


@pytest.mark.parametrize("unit", ["layer", "half", "channel"])
def test_calibration_counts_the_one_backward_pass_of_fisher_scores(unit: Unit, tmp_path: Path) -> None:
    """As many passes as batches there, and back as many; then the final mask is measured."""
    search = MaskSearch(
        write_config(tmp_path / "model.json"), Fisher(rearranged=True), unit=unit, remove=1,
        calibration_batches=8,
    )  # fmt: skip
    hard = (
        8 if unit == "channel" else 8 * (L - 1) / L
    )  # the soft mask of a policy that is sure is the hard one
    assert calibration(search, 0) == pytest.approx(2 * 8 + 8 + hard)


def test_the_toy_is_the_formula() -> None:
    toy = Toy(3, strength=2.0, reach=0.5)
    a, _, c = toy.cost_L.tolist()
    assert float(toy.divergence(torch.tensor([1.0, 1, 1]))) == 0
    assert float(toy.divergence(torch.tensor([0.0, 1, 1]))) == pytest.approx(a)
    both = a + c + 2.0 * 0.5**2 * math.sqrt(a * c)
    assert float(toy.divergence(torch.tensor([0.0, 1, 0]))) == pytest.approx(both)
    assert CountingProbe(3, 4).divergence(torch.tensor([1.0, 0, 1])) == pytest.approx(float(Toy(3).cost_L[1]))
