"""Weights of tokens by entropy: the table's formulas, their mean, and what may not change them."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from src.errors import ConfigError
from src.losses.entropy import TOP, Weight, check_weight, token_weights
from src.training.ranks import WholeBatch

V, N = 50, 40
NAMES: tuple[Weight, ...] = get_args(Weight)


def entropies(seed: int = 0, count: int = N) -> Tensor:
    """Between 0 and the most that is possible."""
    return math.log(V) * torch.rand(count, generator=torch.Generator().manual_seed(seed))


def weights(name: Weight, teacher_N: Tensor, **keys: float) -> Tensor:
    return token_weights(name, teacher_N, V, student_N=teacher_N.flip(0), **keys)


def formula(name: Weight, teacher_N: Tensor, strength: float) -> Tensor:
    """The table of the module, before the mean is made 1."""
    u, s = teacher_N / math.log(V), teacher_N.flip(0) / math.log(V)
    cut = teacher_N.sort().values[math.ceil((1 - TOP) * (len(teacher_N) - 1))]
    return {
        "linear": 1 + strength * u, "ratio": u, "eakd": u * (1 + s) / 2,
        "topq": (teacher_N >= cut).float(), "none": torch.ones_like(u),
    }[name]  # fmt: skip


@pytest.mark.parametrize("strength", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_a_weight_is_its_formula_over_its_mean(name: Weight, strength: float) -> None:
    plain = formula(name, entropies(), strength)
    found = token_weights(name, entropies(), V, strength, entropies().flip(0))
    torch.testing.assert_close(found, plain / plain.mean())
    assert (found >= 0).all()
    assert not found.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_tokens_and_the_base_of_the_logarithm_do_not_matter(name: Weight) -> None:
    teacher, student = entropies(0), entropies(1)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    plain = token_weights(name, teacher, V, student_N=student)
    torch.testing.assert_close(token_weights(name, teacher[order], V, student_N=student[order]), plain[order])
    bits = token_weights(name, 2 * teacher, V**2, student_N=2 * student)  # V^2 tokens have twice the entropy
    torch.testing.assert_close(bits, plain)


@pytest.mark.parametrize("name", ["linear", "ratio", "topq"])
def test_an_uncertain_token_never_weighs_less(name: Weight) -> None:
    rising = entropies().sort().values
    assert (weights(name, rising).diff() >= 0).all()


def test_the_ratio_of_linear_weights_is_bounded_by_its_strength() -> None:
    for strength in (0.0, 0.5, 3.0):
        ends = torch.tensor([0.0, math.log(V)])
        least, most = token_weights("linear", ends, V, strength)
        assert float(most / least) == pytest.approx(1 + strength)


@pytest.mark.parametrize("count", [5, 10, 40, 41])
def test_the_top_share_of_tokens_counts_and_the_others_do_not(count: int) -> None:
    found = weights("topq", entropies(3, count))
    kept = found > 0
    assert int(kept.sum()) == count - math.ceil((1 - TOP) * (count - 1))
    assert float(entropies(3, count)[kept].min()) > float(entropies(3, count)[~kept].max())
    assert len(found[kept].unique()) == 1


@pytest.mark.parametrize("name", ["linear", "ratio"])
def test_with_the_mean_of_the_corpus_a_token_weighs_the_same_in_every_batch(name: Weight) -> None:
    whole, mean = entropies(), float(entropies().mean())
    found = weights(name, whole, mean_entropy=mean)
    torch.testing.assert_close(found.mean(), torch.tensor(1.0))
    for part in (slice(0, 1), slice(3, 20), slice(20, N)):
        torch.testing.assert_close(weights(name, whole[part], mean_entropy=mean), found[part])
    apart = weights(name, whole[3:20])
    assert not torch.allclose(apart, found[3:20], atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_one_rank_is_the_whole_and_no_token_is_no_fault(name: Weight) -> None:
    alone = WholeBatch(N, N, "cpu")
    teacher, student = entropies(0), entropies(1)
    one = token_weights(name, teacher, V, student_N=student, whole=alone)
    assert torch.equal(one, token_weights(name, teacher, V, student_N=student))
    none = torch.zeros(0)
    assert len(token_weights(name, none, V, student_N=none, whole=WholeBatch(0, 0, "cpu"))) == 0
    assert len(token_weights(name, none, V, student_N=none)) == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_teacher_that_is_sure_of_everything_gives_finite_weights(name: Weight) -> None:
    sure = torch.zeros(N)
    found = token_weights(name, sure, V, student_N=sure)
    assert found.isfinite().all()
    if name in ("linear", "none", "topq"):  # the others are multiples of the entropy
        torch.testing.assert_close(found, torch.ones(N))


def test_an_unknown_kind_is_refused_with_a_hint() -> None:
    with pytest.raises(ConfigError, match=r"weight: 'liner' is none of linear, .*linear"):
        check_weight("liner")
    for name in NAMES:
        check_weight(name)
