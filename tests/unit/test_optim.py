"""Laws of the shared-second-moment Adam."""

from __future__ import annotations

import torch

from src.optim import SharedAdam


def trajectory(scale: float, grads: list[torch.Tensor]) -> torch.Tensor:
    p = torch.nn.Parameter(torch.zeros(4))
    optimizer = SharedAdam([p], lr=0.1)
    for g in grads:
        p.grad = scale * g
        optimizer.step()
    return p.detach()


def test_scaling_all_gradients_changes_nothing() -> None:
    grads = [torch.randn(4) for _ in range(5)]
    torch.testing.assert_close(trajectory(1.0, grads), trajectory(1000.0, grads))


def test_updates_keep_the_ratios_of_the_gradients() -> None:
    g = torch.tensor([1.0, 2.0, -4.0, 0.5])
    moved = trajectory(1.0, [g])
    torch.testing.assert_close(moved / moved[0], g / g[0])


def test_first_step_has_root_mean_square_lr() -> None:
    moved = trajectory(1.0, [torch.randn(4)])
    torch.testing.assert_close(moved.pow(2).mean().sqrt(), torch.tensor(0.1))


def test_state_survives_a_round_trip() -> None:
    grads = [torch.randn(4) for _ in range(6)]
    p = torch.nn.Parameter(torch.zeros(4))
    first = SharedAdam([p], lr=0.1)
    for g in grads[:3]:
        p.grad = g
        first.step()
    second = SharedAdam([p], lr=0.1)
    second.load_state_dict(first.state_dict())
    for g in grads[3:]:
        p.grad = g
        second.step()
    assert torch.equal(p.detach(), trajectory(1.0, grads))
