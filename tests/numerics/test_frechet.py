"""The Fréchet distance of final hidden states, by hand, under rotations, and on the states of a cut model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from src.mask import Mask
from src.models.cut import cut
from src.models.loading import load_model
from src.policies import SegmentEvolution
from src.policies.segment_evolution import frechet, moments
from tests.numerics.test_probe import BATCHES, probe_of


def gaussian(mean: list[float], cov: list[list[float]]) -> tuple[Tensor, Tensor]:
    return torch.tensor(mean, dtype=torch.float64), torch.tensor(cov, dtype=torch.float64)


def test_the_frechet_distance_by_hand() -> None:
    one = gaussian([1.0, 0.0], [[4.0, 0.0], [0.0, 9.0]])
    other = gaussian([0.0, 2.0], [[1.0, 0.0], [0.0, 25.0]])
    assert frechet(one, other) == pytest.approx(1 + 4 + (2 - 1) ** 2 + (3 - 5) ** 2)
    assert frechet(one, other) == pytest.approx(frechet(other, one))
    assert frechet(one, one) == pytest.approx(0, abs=1e-12)
    flat = gaussian([1.0, 0.0], [[4.0, 0.0], [0.0, 0.0]])  # fewer states than dimensions
    assert frechet(one, flat) == pytest.approx(9)
    assert math.isnan(frechet(one, gaussian([0.0, 0.0], [[math.nan, 0.0], [0.0, 1.0]])))


def test_the_frechet_distance_does_not_see_a_rotation_of_both() -> None:
    states = torch.randn(2, 40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1)).double())[0]

    def of(states_2NH: Tensor) -> float:
        one, other = ((h.mean(0), h.T.cov(correction=0)) for h in states_2NH)
        return frechet(one, other)

    assert of(states) == pytest.approx(of(states @ turn))
    assert of(states) > 0.1


def test_final_states_are_the_cut_models_and_cost_its_layers(teacher_dir: str) -> None:
    probe = probe_of(teacher_dir, SegmentEvolution(segments=3), "layer", 1.0)
    gates = torch.tensor([1.0, 1, 0, 1, 0, 1])
    student = cut(load_model(teacher_dir), Mask(teacher_dir, 6, (0, 1, 3, 5), "by hand"))
    opened = moments(probe, None)
    before, tokens, seen = probe.search.forward_tokens, 0, []
    for rows, hidden_NH in zip(probe.rows, probe.finals(gates), strict=True):
        ids, real = rows.batch["input_ids"], rows.batch["attention_mask"]
        with torch.no_grad():
            expected = student.model(input_ids=ids, attention_mask=real).last_hidden_state
        assert torch.equal(hidden_NH, expected.flatten(0, 1)[rows.index_N])
        tokens += int(real.sum())
        seen.append(hidden_NH.double())
    assert probe.search.forward_tokens - before == pytest.approx(tokens * 4 / 6)
    assert len(seen) == BATCHES
    together = torch.cat(seen)  # the division into batches does not matter
    mean_H, cov_HH = moments(probe, gates)
    torch.testing.assert_close(mean_H, together.mean(0))
    torch.testing.assert_close(cov_HH, together.T.cov(correction=0))
    assert frechet(opened, moments(probe, torch.ones(6))) == pytest.approx(
        0, abs=1e-9 * float(opened[1].trace())
    )
    assert frechet(opened, (mean_H, cov_HH)) > 1e-3 * float(opened[1].trace())
