"""Laws of a predictor's start and rate: prompts begin with what matters to them; width is no matter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from src.mask import Unit
from src.policies import PromptMasks
from src.routing.clusters import mean_jaccard
from tests.numerics.test_prompt_masks import UNITS, predictor, prompts, rows, search


@pytest.mark.parametrize("unit", UNITS)
def test_prompts_begin_with_the_units_that_matter_to_their_rows(unit: Unit) -> None:
    """Two kinds of prompts of six units each; how large a row's gradients are in all changes nothing."""
    policy = predictor(unit, moved=0.0)
    kind_P = torch.arange(20) % 2
    policy.meet(prompts(20) * 0.1 + kind_P[:, None])
    even_PU = (torch.arange(12) % 2 == kind_P[:, None]).float()
    if unit == "half":  # of which as many attentions go as feed-forwards
        even_PU = (torch.arange(12) // 2 % 2 == kind_P[:, None]).float()
    importance_PU = even_PU + 0.1 * torch.rand(20, 12, generator=torch.Generator().manual_seed(3))
    policy.regress(importance_PU)
    assert policy.prompts is not None
    kept_PU = policy.hard(policy.scores(policy.prompts))
    assert ((kept_PU * even_PU).sum(1) == min(6, policy.space.keep)).all()
    assert mean_jaccard(kept_PU) < 1
    start, logits = policy.up.weight.clone(), policy.logits.clone()
    policy.regress(importance_PU * 2.0 ** torch.arange(-10, 10)[:, None])
    assert torch.equal(policy.up.weight, start)
    assert torch.equal(policy.logits, logits)


def test_rows_that_say_nothing_of_their_prompts_leave_one_mask() -> None:
    policy = predictor("channel", moved=3.0)
    one_U = torch.rand(12, generator=torch.Generator().manual_seed(3))
    policy.regress(one_U.expand(20, -1) * torch.logspace(-1, 1, 20)[:, None])
    assert policy.prompts is not None
    assert mean_jaccard(policy.hard(policy.scores(policy.prompts))) == 1
    assert torch.equal(policy.gates(policy.harden()), policy.space.argmax(one_U))


@pytest.mark.parametrize("unit", ["layer", "channel"])
def test_a_row_matters_as_it_does_alone(teacher_dir: str, unit: Unit) -> None:
    """To a factor, as the loss of a batch is a mean over its positions."""
    made, batch = search(teacher_dir, unit), rows()
    together_BU = made.importance(batch)
    for row in range(3):
        (alone_U,) = made.importance({key: value[row : row + 1] for key, value in batch.items()})
        shares = [x / x.sum() for x in (together_BU[row], alone_U)]
        torch.testing.assert_close(*shares, rtol=1e-3, atol=1e-5)
    assert (together_BU >= 0).all()
    assert together_BU.max() > 0


@pytest.mark.parametrize("noise", [0.0, 0.1, 1.0])
def test_where_kinds_balance_the_start_is_of_the_size_asked_for_and_still_learns(noise: float) -> None:
    """The mean over the prompts then tells no unit from another, and is no measure of their differences."""
    policy, kind_P = predictor(remove=6, moved=0.0, init_scale=0.5), torch.arange(20) % 2
    policy.meet(prompts(20) * 0.1 + kind_P[:, None])
    even_PU = (torch.arange(12) % 2 == kind_P[:, None]).float()
    drawn_PU = torch.rand(20, 12, generator=torch.Generator().manual_seed(3))
    policy.regress(0.2 + even_PU + noise * drawn_PU)
    assert policy.prompts is not None
    scores_PU = policy.scores(policy.prompts).detach()
    assert float(scores_PU.std()) == pytest.approx(0.5, rel=0.4)
    shares_PU = policy.shares(scores_PU)
    assert 0.1 < shares_PU.min() < shares_PU.max() < 0.9, "none is so sure that nothing moves it"


def test_what_matters_counts_the_size_of_activations_and_no_padding(teacher_dir: str) -> None:
    """A channel twice as large, in front of a map half as large, computes the same and counts twice."""
    made, batch = search(teacher_dir, "channel"), rows()
    before_BU = made.importance(batch)
    wider = {key: F.pad(value, (0, 3), value=-100 * (key == "labels")) for key, value in batch.items()}
    torch.testing.assert_close(made.importance(wider), before_BU, rtol=1e-3, atol=1e-7)
    maps = made.head.model.get_submodule("model.layers.0.mlp")
    with torch.no_grad():
        maps.get_parameter("up_proj.weight")[5] *= 2
        maps.get_parameter("down_proj.weight")[:, 5] /= 2
    told_BU = made.importance(batch) / before_BU
    twice_U = torch.ones(told_BU.shape[1]).index_fill_(0, torch.tensor([5]), 2.0)
    torch.testing.assert_close(told_BU, twice_U.expand_as(told_BU), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("init", "step", "calls"), [("salience", 0, 1), ("salience", 7, 0), ("zeros", 0, 0)])
def test_a_search_starts_its_predictor_once(teacher_dir: str, init: Any, step: int, calls: int) -> None:
    """Not when it is resumed, nor where the policy asks for another start."""
    made, found = search(teacher_dir, policy=PromptMasks(hidden=4, init=init)), list[Tensor]()
    made.trainer.global_step = step
    made._calibration = lambda of: of(rows())  # type: ignore[method-assign]
    made.policy.regress = found.append  # type: ignore[method-assign]
    made.on_train_start()
    assert len(found) == calls
    assert all(torch.equal(told, made.importance(rows())) for told in found)


def test_a_step_of_adam_moves_the_logits_alike_in_narrow_and_wide_models() -> None:
    """Through either map by a part of the rate; W2 is of size one here."""
    moved = {}
    for size in (16, 1024):
        for name in ("down", "up"):
            noise, policy = torch.Generator().manual_seed(1), PromptMasks(hidden=64, init="zeros")
            policy.setup(12, 3)
            policy.reads(size)
            policy.meet(torch.randn(20, size, generator=noise))
            torch.nn.init.normal_(policy.up.weight, generator=noise)
            (weight,) = getattr(policy, name).parameters()
            read = torch.randn(1, size, generator=noise)
            before = policy.scores(read)
            before.sum().backward()
            torch.optim.Adam([weight], lr=0.01).step()
            moved[name, size] = float((policy.scores(read) - before).detach().abs().mean()) / 0.01
    for name in ("down", "up"):
        assert moved[name, 1024] == pytest.approx(moved[name, 16], rel=0.5)
        assert moved[name, 1024] < 2
