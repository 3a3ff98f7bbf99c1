"""Differentiated descent and its windows: closed forms, finite differences, and scripted series."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from src.errors import ConfigError
from src.prompts.unroll import Data, descend, unroll
from src.prompts.windows import Inner, Windows

RATE, STEEP, STEPS = 0.1, 3.0, 5
LEFT = 1 - RATE * STEEP
"""Share of the distance to the data that a step of descent on :func:`bowl` leaves."""


def bowl(theta: Tensor, data: Data) -> Tensor:
    return 0.5 * STEEP * (theta - data[0]).square().sum()


def bent(theta: Tensor, data: Data) -> Tensor:
    """A loss whose second derivatives depend on all that there is."""
    return (theta * data[0]).tanh().square().sum() + 0.3 * (theta.sin() * data[0].square()).sum()


def whole(theta: Tensor, data: Tensor) -> Tensor:
    """All steps, differentiated by autograd alone."""
    for _ in range(STEPS):
        theta = theta - RATE * torch.autograd.grad(bent(theta, (data,)), theta, create_graph=True)[0]
    return theta


def windowed(data: Tensor, first: int, size: int) -> Tensor:
    path, _ = descend(bent, START.clone(), (data,), RATE, first)
    return unroll(bent, path[first], (data,), RATE, size)


START, DATA = torch.tensor([0.4, -0.9, 1.3]).double(), torch.tensor([0.7, 1.1, -0.5]).double()


def gradient(theta: Tensor, data: Tensor) -> Tensor:
    """Of an outer loss that ends at theta."""
    (grad,) = torch.autograd.grad(theta.pow(3).sum(), data, retain_graph=True)
    return grad


def test_a_bowl_by_hand() -> None:
    """theta_t = s + LEFT^t (theta_0 - s), so W differentiated steps have the slope 1 - LEFT^W in s."""
    theta, data = torch.tensor([2.0]).double(), torch.tensor([0.5]).double().requires_grad_()
    path, norms = descend(bowl, theta, (data,), RATE, STEPS)
    expected = [0.5 + LEFT**t * 1.5 for t in range(STEPS + 1)]
    assert [float(each) for each in path] == pytest.approx(expected)
    assert norms.tolist() == pytest.approx([STEEP * (each - 0.5) for each in expected[:-1]])
    for first, size in ((0, STEPS), (3, 2), (STEPS, 0)):
        end = unroll(bowl, path[first], (data,), RATE, size)
        assert float(end.detach()) == pytest.approx(expected[first + size])
        slope = torch.autograd.grad(end, data, allow_unused=True)[0]
        assert (0.0 if slope is None else float(slope)) == pytest.approx(1 - LEFT**size)


def test_a_window_of_all_steps_is_back_propagation_through_time() -> None:
    data = DATA.clone().requires_grad_()
    full = whole(START.clone().requires_grad_(), data)
    assert torch.equal(windowed(data, 0, STEPS), full)
    assert torch.equal(gradient(windowed(data, 0, STEPS), data), gradient(full, data))
    ends = [windowed(data.detach() + 1e-6 * sign * one, 0, STEPS).pow(3).sum()
            for one in torch.eye(3).double() for sign in (1, -1)]  # fmt: skip
    slopes = torch.stack([up - down for up, down in zip(ends[::2], ends[1::2], strict=True)]) / 2e-6
    torch.testing.assert_close(gradient(full, data), slopes.detach(), rtol=1e-7, atol=1e-8)


def test_nothing_outside_the_window_has_a_part_in_the_gradient() -> None:
    """Steps in front of it that are detached by hand change no bit; differentiated, they would."""
    data = DATA.clone().requires_grad_()
    outside = unroll(bent, START, (data,), RATE, 2)
    by_hand = unroll(bent, outside.detach(), (data,), RATE, 3)
    assert torch.equal(gradient(windowed(data, 2, 3), data), gradient(by_hand, data))
    assert not torch.allclose(gradient(by_hand, data), gradient(windowed(data, 0, 5), data), rtol=1e-2)


def test_plain_steps_hold_no_graph() -> None:
    path, norms = descend(bent, START, (DATA.clone().requires_grad_(),), RATE, 3)
    assert not any(each.requires_grad for each in (*path, norms))


# ---------------------------------------------------------------------- windows


def test_the_early_window_lies_where_the_norm_is_large_and_is_long_where_it_changes() -> None:
    """n = 0 ... 90 0, T 8, w 4, d 2: t is where 90 stands; rank of its D is 6 (the fall behind it ties)."""
    for at, first in ((2, 2), (6, 3)):
        norms_T = torch.zeros(8)
        norms_T[at] = 90.0
        size = int(4 - 2 + 2 * 2 * 6 / 8)
        assert size == 5
        found = Windows(Inner(8, 1.0, 4, 2)).choose(norms_T, torch.Generator().manual_seed(at))
        assert found == (min(at, 8 - size), size) == (first, 5)
    steady = Windows(Inner(8, 1.0, 4, 2)).choose(torch.full((8,), 3.0), torch.Generator().manual_seed(0))
    assert steady[1] == 2, "where no norm changes, every rank is 0: w - d"


def test_the_middle_window_is_long_and_lies_anywhere() -> None:
    windows, generator = Windows(Inner(8, 1.0, 4, 1)), torch.Generator().manual_seed(0)
    windows.stage = 2
    drawn = Counter(windows.choose(torch.zeros(0), generator) for _ in range(400))
    assert set(drawn) == {(first, 5) for first in range(4)}
    assert min(drawn.values()) > 60


def test_the_late_window_counts_from_the_end_and_never_begins_before_the_start() -> None:
    windows = Windows(Inner(8, 1.0, 4, 1))
    windows.stage = 3
    for at, first in ((0, 5), (2, 3), (5, 0), (7, 0)):
        norms_T = torch.zeros(8)
        norms_T[at] = 90.0
        assert windows.choose(norms_T, torch.Generator().manual_seed(at)) == (first, 3)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_full_back_propagation_is_the_case_of_a_window_of_all_steps(stage: int) -> None:
    windows = Windows(Inner(6, 1.0, 6, 0))
    windows.stage = stage
    for seed in range(10):
        norms_T = torch.rand(6, generator=torch.Generator().manual_seed(seed))
        assert windows.choose(norms_T, torch.Generator().manual_seed(seed)) == (0, 6)


def test_stages_by_a_scripted_series() -> None:
    """T 20: three gains in a row below 1.5 % end the first stage, three (at least 2.5) below 1 % the next."""
    windows, seen = Windows(Inner(20, 1.0, 4, 1)), list[int]()
    for kl in (
        1.0,
        0.99,
        0.98,
        0.96,
        0.95,
        0.94,
        0.94,
        0.928,
        0.92,
        0.915,
        0.905,
        0.9,
        0.899,
        0.899,
        0.8,
        0.9,
    ):
        windows.heed(kl)
        seen.append(windows.stage)
    #      gain  -   1.0  1.0  2.0 | 1.0  1.1  0.0 -> 2 | 1.3, 0.9, 0.5, 1.1 | 0.6, 0.1, 0.0 -> 3
    assert seen == [1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3]
    again = Windows(Inner(20, 1.0, 4, 1))
    again.load_state_dict(windows.state_dict())
    assert (again.stage, again.slow, again.last) == (3, 0, 0.9)


@pytest.mark.parametrize("wrong", [{"window": 1, "spread": 1}, {"window": 8, "spread": 1}, {"rate": 0.0}])
def test_windows_that_do_not_fit_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"model\.inner"):
        Inner(**{"steps": 8, "window": 4, "spread": 2, **wrong})
