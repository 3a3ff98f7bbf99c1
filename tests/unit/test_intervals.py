"""Intervals by resampling, and the verdicts that they allow."""

from __future__ import annotations

import numpy as np
import pytest

from src.evaluate.intervals import MANY, interval, verdict


def test_the_interval_of_a_share_is_the_binomials() -> None:
    right = np.zeros((1, 100))
    right[0, :30] = 1  # resampled: Binomial(100, 0.3), whose quantiles are 21 and 39
    found = interval(right, np.ones(100))
    assert found == pytest.approx({"value": 0.30, "low": 0.21, "high": 0.39}, abs=1e-9)


def test_a_mean_over_tokens_weighs_problems_by_their_tokens() -> None:
    tokens = np.array([1.0, 10.0, 100.0])
    assert interval(3 * tokens[None], tokens) == pytest.approx({"value": 3, "low": 3, "high": 3})
    assert interval(np.array([[111.0, 0, 0]]), tokens)["value"] == 1.0


def test_seeds_are_resampled_too() -> None:
    two = np.array([[0.0] * 50, [1.0] * 50])  # all the spread is between seeds: means 0, 1/2, 1
    assert interval(two, np.ones(50)) == pytest.approx({"value": 0.5, "low": 0.0, "high": 1.0})


def test_verdicts() -> None:
    def ends(low: float, high: float) -> dict[str, float]:
        return {"value": (low + high) / 2, "low": low, "high": high}

    assert verdict(ends(-0.1, 0.2), True) == "tied"
    assert verdict(ends(0.0, 0.0), True) == verdict(ends(0.0, 0.3), False) == "tied"
    assert verdict(ends(0.1, 0.2), True) == verdict(ends(-0.2, -0.1), False) == "better"
    assert verdict(ends(0.1, 0.2), False) == verdict(ends(-0.2, -0.1), True) == "worse"


def test_of_many_items_the_interval_is_the_one_that_resampling_tends_to() -> None:
    rng = np.random.default_rng(3)
    sizes = rng.integers(1, 9, MANY + 1).astype(float)
    sums = rng.exponential(sizes)[None]
    many, resampled = interval(sums, sizes), interval(sums[:, :-1], sizes[:-1], 2_000)
    for end in ("value", "low", "high"):
        assert many[end] == pytest.approx(resampled[end], rel=1e-3)
