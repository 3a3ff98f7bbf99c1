"""Parts of a batch: micro-batches one after the other have the gradient of all rows at once."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from src.policies.draws import Draw, over_ranks
from src.training.ranks import MicroBatches, WholeBatch, from_all, least, most, total

SPLITS = [[12], [6, 6], [1, 11], [11, 1], [5, 4, 3], [1] * 12]


def rows() -> Tensor:
    return torch.randn(12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def gradient(sizes: list[int], weighed: bool = True) -> Tensor:
    """As a run makes it: the loss of each part over the number of parts, then one step."""
    model, micro = nn.Linear(4, 1, bias=False).double(), MicroBatches()
    with torch.no_grad():
        model.weight.copy_(torch.arange(4.0)[None])
    for part in rows().split(sizes):
        loss = model(part).square().mean()
        loss = micro.weigh(loss, len(part)) if weighed else loss
        (loss / len(sizes)).backward()
    if weighed:
        micro.settle(model.parameters(), len(sizes))
    assert model.weight.grad is not None
    return model.weight.grad


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_the_split_into_micro_batches_changes_no_gradient(sizes: list[int]) -> None:
    torch.testing.assert_close(gradient(sizes), gradient([12]), rtol=1e-12, atol=1e-12)
    if len(set(sizes)) > 1:
        assert not torch.allclose(gradient(sizes, weighed=False), gradient([12]), rtol=1e-2)


def test_a_step_forgets_the_micro_batches_of_the_one_before() -> None:
    micro, weight = MicroBatches(), nn.Parameter(torch.ones(2))
    for sizes in ([3, 5], [7, 1, 2]):
        for size in sizes:
            micro.weigh(weight.sum(), size).div(len(sizes)).backward()
        micro.settle([weight], len(sizes))
        torch.testing.assert_close(weight.grad, torch.ones(2))  # of a mean of ones
        weight.grad = None
    assert (micro.first, micro.sum) == (0.0, 0.0)


@pytest.mark.parametrize("sizes", [[0, 4, 8], [4, 0, 8], [4, 8, 0], [0, 0, 12]], ids=str)
def test_a_micro_batch_with_nothing_to_learn_counts_for_nothing(sizes: list[int]) -> None:
    """Its loss is zero; the others make the gradient."""
    model, micro = nn.Linear(4, 1, bias=False).double(), MicroBatches()
    with torch.no_grad():
        model.weight.copy_(torch.arange(4.0)[None])
    for part in rows().split(sizes):
        loss = model(part).square().sum() / (len(part) or 1)
        (micro.weigh(loss, len(part)) / len(sizes)).backward()
    micro.settle(model.parameters(), len(sizes))
    torch.testing.assert_close(model.weight.grad, gradient([12]), rtol=1e-12, atol=1e-12)


def test_a_step_with_nothing_to_learn_moves_nothing() -> None:
    micro, weight = MicroBatches(), nn.Parameter(torch.ones(2))
    for _ in range(2):
        micro.weigh(0.0 * weight.sum(), 0).backward()
    micro.settle([weight], 2)
    assert torch.equal(weight.grad, torch.zeros(2))


def test_frozen_weights_have_no_gradient_to_scale() -> None:
    micro, frozen = MicroBatches(), nn.Parameter(torch.ones(2), requires_grad=False)
    micro.weigh(torch.ones(()), 3)
    micro.settle([frozen], 1)
    assert frozen.grad is None


def test_one_process_is_the_whole() -> None:
    x = torch.arange(5.0)
    whole = WholeBatch(5, 9, "cpu")
    assert (whole.share, whole.positions, whole.tokens) == (5, 5, 9)
    assert torch.equal(whole.mean(x), x.mean())
    assert torch.equal(whole.gather(x), x)
    assert total(x) is x
    assert from_all({"a": 1}) == [{"a": 1}]
    assert (least(3, "cpu"), most(3, "cpu")) == (3, 3)


@pytest.mark.parametrize("graded", [True, False])
def test_draws_come_as_rows_in_their_order(graded: bool) -> None:
    draws = [
        Draw(torch.ones(3), torch.tensor(float(n)), n * torch.ones(3) if graded else None) for n in range(4)
    ]
    for order in itertools.islice(itertools.permutations(draws), 5):
        losses_D, grads_DU = over_ranks(order)
        assert losses_D.tolist() == [float(each.loss) for each in order]
        assert (grads_DU is None) is not graded
        if grads_DU is not None:
            assert grads_DU.tolist() == [[float(each.loss)] * 3 for each in order]
