"""Intervals by resampling, and the verdicts that they allow."""

from __future__ import annotations

import numpy as np
import pytest

from src.evaluate.intervals import MANY, interval, shares, verdict


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


def test_of_many_items_the_seeds_spread_counts_too() -> None:
    """Two seeds far apart: what resampling them gives has the ends 0, 1/2 and 1; the normal one as wide."""
    two = np.array([[0.0] * (MANY + 1), [1.0] * (MANY + 1)])
    found = interval(two, np.ones(MANY + 1))
    spread = 1.96 * 0.5 / 2**0.5
    assert found == pytest.approx({"value": 0.5, "low": 0.5 - spread, "high": 0.5 + spread}, abs=1e-9)
    rng = np.random.default_rng(0)
    seeds = rng.normal(size=(12, 1)) + rng.normal(size=(12, MANY + 1))
    many, resampled = interval(seeds, np.ones(MANY + 1)), interval(seeds[:, :500], np.ones(500), 2_000)
    assert many["high"] - many["low"] == pytest.approx(resampled["high"] - resampled["low"], rel=0.15)


def test_an_interval_moves_and_stretches_with_its_figures_and_forgets_the_order_of_seeds() -> None:
    rng = np.random.default_rng(1)
    sums, sizes = rng.normal(size=(3, 40)), rng.integers(1, 6, 40).astype(float)
    plain = interval(sums, sizes, 500)
    moved = interval(2 * sums + 7 * sizes, sizes, 500)
    assert moved == pytest.approx({end: 2 * value + 7 for end, value in plain.items()})
    turned = interval(-sums, sizes, 500)
    assert (turned["low"], turned["high"]) == pytest.approx((-plain["high"], -plain["low"]))
    assert interval(sums, 2 * sizes, 500) == pytest.approx({end: v / 2 for end, v in plain.items()})
    assert plain["low"] < plain["value"] < plain["high"]


def test_a_difference_is_paired() -> None:
    """Of two methods that differ by a constant the difference is sure, whatever each one's interval."""
    rng = np.random.default_rng(2)
    one = rng.normal(size=(2, 60))
    apart = interval((one + 0.01) - one, np.ones(60), 500)
    assert apart["high"] - apart["low"] < 1e-12
    assert verdict(apart, True) == "better"
    wide = interval(one, np.ones(60), 500)
    assert wide["high"] - wide["low"] > 0.2


def test_shares_are_those_of_a_resample_and_streams_are_apart() -> None:
    items, seeds = shares(9, 0, 300), shares(9, 1, 300)
    assert np.allclose(items.sum(1), 1)
    assert np.allclose(items * 9, np.round(items * 9))
    assert not np.array_equal(items, seeds)
    assert np.array_equal(items, shares(9, 0, 300))
    assert np.abs(items.mean(0) - 1 / 9).max() < 4 * (8 / 81 / 9 / 300) ** 0.5


def test_an_item_that_counts_for_nothing_changes_nothing() -> None:
    """Else some resample would hold such items alone, of which there is no mean."""
    rng = np.random.default_rng(4)
    sums, sizes = rng.normal(size=(2, 4)), np.array([3.0, 1.0, 2.0, 5.0])
    more = interval(np.insert(sums, [0, 2, 4], 0.0, axis=1), np.insert(sizes, [0, 2, 4], 0.0))
    assert more == interval(sums, sizes)
    assert all(np.isfinite([*more.values()]))
