"""Packing: a packed row is its documents, in tokens, in loss and in gradient."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from src.data.batches import Packed, Padded, pack, real_tokens
from src.data.boundaries import check_boundaries
from src.data.encode import IGNORE, TokenRow
from src.errors import ConfigError
from tests.data_tools import corpus, numbered, write_rows
from tests.tiny import VOCAB, WINDOW, tiny_model

SIZE = 32


def documents(lengths: list[int], prompt: int = 0) -> list[TokenRow]:
    rng = random.Random(0)
    rows = [[rng.randrange(3, VOCAB) for _ in range(length)] for length in lengths]
    return [TokenRow(ids, [IGNORE] * prompt + ids[prompt:], "") for ids in rows]


@given(st.lists(st.integers(2, SIZE), max_size=40))
def test_packing_places_every_row_within_bounds_and_wastes_little(lengths):
    rows = documents(lengths)
    bins = pack(rows, SIZE)
    assert sorted(map(id, (row for bin_ in bins for row in bin_))) == sorted(map(id, rows))
    filled = [sum(len(row.ids) for row in bin_) for bin_ in bins]
    assert all(f <= SIZE for f in filled)
    assert sum(f <= SIZE / 2 for f in filled) <= 1  # two such would have shared a row


@given(st.lists(st.integers(2, SIZE), min_size=1, max_size=40), st.integers(1, 7), st.booleans())
def test_plans_hold_every_row_once_in_even_batches(lengths, batch_size, shuffle):
    for batching in (Padded(batch_size, SIZE, 0), Packed(batch_size, SIZE, 0)):
        rows = documents(lengths)
        plan = batching.plan(list(rows), random.Random(0) if shuffle else None)
        assert sorted(id(d) for b in plan for r in b for d in r) == sorted(map(id, rows))
        sizes = [len(batch) for batch in plan]
        assert max(sizes) <= batch_size
        assert max(sizes) - min(sizes) <= 1


def test_packed_batches_hold_only_what_a_decoder_accepts():
    batch = Packed(2, SIZE, 0).collate([documents([9, 5, 7]), documents([31])])
    assert set(batch) == {"input_ids", "position_ids", "labels"}
    assert {(tuple(t.shape), t.dtype) for t in batch.values()} == {((2, SIZE), torch.int64)}
    assert batch["position_ids"][0].tolist() == [*range(9), *range(5), *range(7), *[0] * 11]
    assert (batch["labels"][batch["position_ids"] == 0] == IGNORE).all()
    assert real_tokens(batch) == 9 + 5 + 7 + 31


def loss_and_gradient(model, batches: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """The mean loss over all supervised tokens of several batches, and its gradient, flat."""
    model.zero_grad()
    total, count = torch.zeros(()), 0
    for batch in batches:
        labels = batch["labels"][:, 1:].flatten()
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
        total = total + torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        count += int((labels != IGNORE).sum())
    (total / count).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return total.detach() / count, gradient


def assert_packed_is_singly(model, prompt: int, tolerance: float) -> None:
    """Loss and gradient of packed and of padded rows are those of the documents, relatively."""
    rows = documents([9, 5, 7, 17, 4, 12], prompt)
    packed = [Packed(2, SIZE, 0).collate([rows[:3], rows[3:5]]), Packed(1, SIZE, 0).collate([rows[5:]])]
    padded = [Padded(6, SIZE, 0).collate([[row] for row in rows])]
    loss, gradient = loss_and_gradient(model, [Padded(1, SIZE, 0).collate([[row]]) for row in rows])
    for batches in (packed, padded):
        other, others = loss_and_gradient(model, batches)
        assert abs(other - loss) <= tolerance * loss
        assert (others - gradient).norm() <= tolerance * gradient.norm()


@pytest.mark.parametrize("prompt", [0, 3], ids=["text", "answer"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_a_packed_row_is_its_documents(family, attention, prompt):
    """In fp32 to 1e-6, with a sliding and a full layer, and documents longer than the window."""
    kinds = {} if family == "llama" else {"layer_types": ["sliding_attention", "full_attention"]}
    model = tiny_model(family, attn_implementation=attention, num_hidden_layers=2, **kinds)
    assert family == "llama" or model.config.sliding_window == WINDOW < 17
    assert_packed_is_singly(model, prompt, 1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_only_rounding_sets_packed_and_single_apart(family):
    """In fp64 to 1e-13, at full depth (Gemma computes its norms in fp32, whatever the weights)."""
    model = tiny_model(family, attn_implementation="sdpa").double()
    assert_packed_is_singly(model, 0, 1e-13)


def test_without_boundaries_the_loss_is_another():
    """The law above can fail: the same row with running positions sees across its documents."""
    model, rows = tiny_model("llama"), documents([9, 5, 7])
    packed = Packed(1, SIZE, 0).collate([rows])
    blurred = {**packed, "position_ids": torch.arange(SIZE)[None]}
    right, _ = loss_and_gradient(model, [packed])
    wrong, _ = loss_and_gradient(model, [blurred])
    assert abs(right - wrong) > 1e-2


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt2", "mixtral"])
def test_models_that_keep_documents_apart_pass(family):
    check_boundaries(tiny_model(family))


@pytest.mark.parametrize("family", ["mamba", "lfm2", "opt", "bloom", "gpt_oss"])
def test_models_that_do_not_are_refused(family):
    with pytest.raises(ConfigError, match=r"does not keep the documents of a packed row apart.*'padded'"):
        check_boundaries(tiny_model(family))


def test_the_check_leaves_the_mode_alone():
    for mode in (True, False):
        model = tiny_model("llama").train(mode)
        check_boundaries(model)
        assert model.training is mode


def test_packing_fills_rows(tmp_path):
    data = corpus(tmp_path, write_rows(tmp_path / "a.jsonl", numbered(400)), packing="documents")
    loader = data.loader("train", shuffle=True)
    for _ in loader:
        loader.handed()
    assert loader.statistics.numbers()["waste"] < 0.1
