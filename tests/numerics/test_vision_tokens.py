"""Laws of merged tokens: by hand on small grids, against full autograd, to the last bit where none merges."""

from __future__ import annotations

from copy import deepcopy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import ViTForImageClassification
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from src.vision.digits import COLUMNS, classifier
from src.vision.tokens import (
    CENTRE,
    DECAY,
    MERGED,
    PRUNED,
    MergedBlock,
    compress,
    importance,
    merging,
    nearest,
    parts,
    restoring,
    token_score,
)

PATCHES = COLUMNS**2
SEED = torch.Generator().manual_seed(0)
IMAGES, LABELS = torch.rand(6, 1, 8, 8, generator=SEED), torch.arange(6)
SCORES = torch.rand(4, PATCHES, generator=SEED)


@pytest.fixture
def model() -> ViTForImageClassification:
    """A classifier with weights so large that attention is not uniform."""
    made = classifier(0)
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(4)
    return made


def matrices(prune: float, keep: float) -> list[Tensor]:
    """Merge matrices of four blocks."""
    return [merging(*each, COLUMNS) for each in zip(parts(SCORES, prune, keep), SCORES, strict=True)]


# ---------------------------------------------------------------------- the score


def test_the_score_is_the_derivative_by_the_attention_that_a_key_gets() -> None:
    """By hand: with a factor on each column of A, ``dLoss/dfactor`` is ``sum of A dLoss/dA``."""
    query, key, value = (torch.randn(3, 2, 5, 4, generator=SEED, dtype=torch.float64) for _ in range(3))
    target = torch.randn(3, 2, 5, 4, generator=SEED, dtype=torch.float64)
    attention = (query @ key.transpose(-1, -2)).softmax(-1).requires_grad_()
    factor_T = torch.ones(5, dtype=torch.float64, requires_grad=True)
    loss = ((attention * factor_T) @ value - target).pow(3).sum()
    by_attention, by_factor = torch.autograd.grad(loss, (attention, factor_T))
    torch.testing.assert_close(token_score(attention, by_attention), by_factor[1:].abs())


def test_signs_cancel_within_a_batch() -> None:
    attention = torch.full((2, 1, 2, 2), 0.5)
    gradient = torch.tensor([[[[9.0, 1.0], [9.0, 2.0]]], [[[9.0, 3.0], [9.0, -4.0]]]])
    assert token_score(attention, gradient).tolist() == [1.0], "0.5 (1 + 2 + 3 - 4); the class token has none"
    gradient[1] *= -1
    assert token_score(attention, gradient).tolist() == [2.0]


def test_the_score_of_a_classifier_is_that_of_full_autograd(model: ViTForImageClassification) -> None:
    """Its attention with a factor on each key, in every block; two batches, between which no sign cancels."""
    factors = torch.ones(5, 1 + PATCHES, requires_grad=True)
    number = {layer.attention: i for i, layer in enumerate(model.vit.layers)}

    def gated(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        attention = (query @ key.transpose(2, 3) * module.scaling).softmax(-1) * factors[number[module]]
        return (attention @ value).transpose(1, 2).contiguous(), attention

    batches = [(IMAGES[:4], LABELS[:4]), (IMAGES[4:], LABELS[4:])]
    found = importance(model, batches)
    ALL_ATTENTION_FUNCTIONS.register("gated_keys", gated)
    model.set_attn_implementation("gated_keys")
    total = torch.zeros(5, PATCHES)
    for images, labels in batches:
        (gradient,) = torch.autograd.grad(model(images, labels=labels).loss, factors)
        total += gradient[:, 1:].abs()
    expected = total / total.norm(dim=-1, keepdim=True) * torch.tensor([[1 - DECAY * i] for i in range(5)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert (found.argsort() != importance(model_of(model), [(IMAGES, LABELS)]).argsort()).any(), (
        "the absolute value comes behind the sum over a batch, so its size matters"
    )


def model_of(model: ViTForImageClassification) -> ViTForImageClassification:
    """The classifier with its usual attention."""
    model.set_attn_implementation("sdpa")
    return model


def test_scoring_leaves_the_classifier_as_it_is(model: ViTForImageClassification) -> None:
    before, how = deepcopy(model.state_dict()), model.config._attn_implementation
    importance(model, [(IMAGES, LABELS)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
    assert model.config._attn_implementation == how != "eager"


# ---------------------------------------------------------------------- the thresholds


@pytest.mark.parametrize(("prune", "keep"), [(0.1, 0.65), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (0.3, 0.7)])
def test_the_thresholds_are_exact_over_all_blocks(prune: float, keep: float) -> None:
    part_LP = parts(SCORES, prune, keep)
    low, high = round(64 * prune), round(64 * keep)
    assert [int((part_LP == part).sum()) for part in (PRUNED, MERGED, CENTRE)] == [low, 64 - low - high, high]
    ordered = part_LP.flatten()[SCORES.flatten().argsort()]
    assert torch.equal(ordered, ordered.sort().values), "who scores higher is not treated worse"
    assert len({int((each == CENTRE).sum()) for each in part_LP}) > 1 or high in (0, 64), "blocks differ"


def test_equal_scores_are_told_apart_by_their_order() -> None:
    assert parts(torch.ones(2, 3), 1 / 3, 1 / 3).tolist() == [[0, 0, 1], [1, 2, 2]]


def test_a_larger_share_only_adds_tokens() -> None:
    shares = [i / 20 for i in range(21)]
    for part, grown in ((CENTRE, [parts(SCORES, 0.0, share) for share in shares]),
                        (PRUNED, [parts(SCORES, share, 0.0) for share in shares])):  # fmt: skip
        for less, more in pairwise(grown):
            assert ((less == part) <= (more == part)).all()
            assert (more == part).sum() > (less == part).sum()
    counts = [sum(len(merge_CT) for merge_CT in matrices(0.0, share)) for share in shares]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (4, 4 * (1 + PATCHES)), "the class token always stays"


# ---------------------------------------------------------------------- the matrices

HAND = torch.tensor([CENTRE, MERGED, MERGED, PRUNED, MERGED, CENTRE])
HAND_SCORES = torch.tensor([6.0, 2.0, 3.0, 1.0, 4.0, 8.0])
"""Two rows of three patches; centres at the first and the last::

    C m m
    x m C
"""


def test_two_rows_of_three_by_hand() -> None:
    assert nearest(HAND, 3).tolist() == [0, 0, 5, 0, 5, 5]
    merge_CT = merging(HAND, HAND_SCORES, 3)
    by_hand = [[1, 0, 0, 0, 0, 0, 0], [0, 6 / 8, 2 / 8, 0, 0, 0, 0], [0, 0, 0, 3 / 15, 0, 4 / 15, 8 / 15]]
    torch.testing.assert_close(merge_CT, torch.tensor(by_hand))
    undone = restoring(merge_CT)
    torch.testing.assert_close(undone[:, 1], torch.tensor([0, 1.2, 0.4, 0, 0, 0, 0]))  # 6 : 2, by 0.625
    torch.testing.assert_close(undone, torch.linalg.pinv(merge_CT))


def test_a_block_on_two_rows_of_three_by_hand() -> None:
    """The block adds 10; the pruned patch, the fourth, leaves as it entered."""
    block = MergedBlock(Adds(10), merging(HAND, HAND_SCORES, 3))
    entered = torch.tensor([5.0, 4.0, 8.0, 3.0, -7.0, 6.0, 9.0])[None, :, None]
    first, last = 4 * 6 / 8 + 8 * 2 / 8 + 10, 3 * 3 / 15 + 6 * 4 / 15 + 9 * 8 / 15 + 10
    scale = 15 / 89  # 15 / (9 + 16 + 64)
    left = [15.0, 1.2 * first, 0.4 * first, 3 * scale * last, -7.0, 4 * scale * last, 8 * scale * last]
    torch.testing.assert_close(block(entered)[0, :, 0], torch.tensor(left))


class Adds(nn.Module):
    """A block that adds a number, and notes how many tokens it got."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number, self.tokens = number, 0

    def forward(self, hidden_BTH: Tensor) -> Tensor:
        self.tokens = hidden_BTH.shape[1]
        return hidden_BTH + self.number


@pytest.mark.parametrize(("prune", "keep"), [(0.1, 0.65), (0.0, 0.3), (0.3, 0.7), (0.25, 0.05)])
def test_rows_are_means_and_the_restored_is_a_projection(prune: float, keep: float) -> None:
    for part_P, merge_CT in zip(parts(SCORES, prune, keep), matrices(prune, keep), strict=True):
        undone_TC = restoring(merge_CT)
        torch.testing.assert_close(merge_CT.sum(-1), torch.ones(len(merge_CT)))
        assert (merge_CT >= 0).all()
        assert torch.equal(merge_CT[0], torch.eye(1 + PATCHES)[0]), "the class token passes alone"
        in_rows = (merge_CT > 0).sum(0)[1:]
        if (part_P == CENTRE).any():
            assert torch.equal(in_rows, (part_P != PRUNED).long()), "each in one row, the pruned in none"
        torch.testing.assert_close(merge_CT @ undone_TC, torch.eye(len(merge_CT)))
        there_and_back = undone_TC @ merge_CT
        torch.testing.assert_close(there_and_back, there_and_back.T)
        alone = merge_CT[(merge_CT > 0).sum(-1) == 1].nonzero()[:, 1]
        hidden_TH = torch.randn(1 + PATCHES, 7)
        assert torch.equal((undone_TC @ (merge_CT @ hidden_TH))[alone], hidden_TH[alone]), (
            "nothing merges there"
        )


def test_only_ratios_of_scores_count_and_zeros_merge_evenly() -> None:
    torch.testing.assert_close(merging(HAND, 1e-6 * HAND_SCORES, 3), merging(HAND, HAND_SCORES, 3))
    assert merging(HAND, torch.zeros(6), 3)[1].tolist() == [0, 0.5, 0.5, 0, 0, 0, 0]


def test_the_nearest_centre_is_that_of_a_search_by_hand() -> None:
    for part_P in parts(SCORES, 0.1, 0.4):
        centres = (part_P == CENTRE).nonzero()[:, 0].tolist()
        for patch, found in enumerate(nearest(part_P, COLUMNS).tolist()):
            far = [(patch // 4 - c // 4) ** 2 + (patch % 4 - c % 4) ** 2 for c in centres]
            assert found == centres[far.index(min(far))]


# ---------------------------------------------------------------------- the blocks


def test_where_all_are_centres_the_output_is_the_same_to_the_last_bit(
    model: ViTForImageClassification,
) -> None:
    whole = model(IMAGES).logits
    (identity, *_) = matrices(0.0, 1.0)
    assert torch.equal(identity, torch.eye(1 + PATCHES))
    assert torch.equal(restoring(identity), identity)
    assert torch.equal(compress(model, dict.fromkeys(range(5), identity))(IMAGES).logits, whole)


def test_without_merges_a_block_is_that_on_the_kept_tokens_alone(model: ViTForImageClassification) -> None:
    """To the last bit; the pruned leave as they entered."""
    hidden = torch.randn(3, 1 + PATCHES, 48)
    part_P = parts(SCORES, 0.4, 0.6)[0]
    kept = [0, *(1 + (part_P == CENTRE).nonzero()[:, 0]).tolist()]
    gone = [token for token in range(1 + PATCHES) if token not in kept]
    block = model.vit.layers[1]
    out = MergedBlock(block, matrices(0.4, 0.6)[0])(hidden)
    assert len(gone) > 2
    assert torch.equal(out[:, kept], block(hidden[:, kept]))
    assert torch.equal(out[:, gone], hidden[:, gone])


def test_without_a_centre_the_class_token_is_computed_alone() -> None:
    part_P = torch.tensor([MERGED, PRUNED, MERGED, MERGED])
    inner, hidden = Adds(10), torch.randn(2, 5, 3)
    out = MergedBlock(inner, merging(part_P, torch.ones(4), 2))(hidden)
    assert inner.tokens == 1
    assert torch.equal(out[:, 0], hidden[:, 0] + 10)
    assert torch.equal(out[:, 1:], hidden[:, 1:])


def test_both_matrices_learn(model: ViTForImageClassification) -> None:
    compress(model, {1: matrices(0.1, 0.65)[0]})
    model(IMAGES, labels=LABELS).loss.backward()
    block = model.vit.layers[1]
    moved = {name for name, weight in block.named_parameters(recurse=False) if weight.grad.abs().sum() > 0}
    assert moved == {"merge_CT", "restore_TC"}
    assert "pruned_T1" in dict(block.named_buffers())
