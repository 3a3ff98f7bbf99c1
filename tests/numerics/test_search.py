"""Laws of the search: what is told to the policy is the true gradient, and nothing but the policy moves."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch

from src.data.arithmetic import build_tokenizer, problems
from src.errors import ConfigError
from src.losses.distill import Distillation
from src.policies import GumbelTopK
from src.policies.polish import polish
from src.search import MaskSearch
from src.teachers import LiveTeacher
from src.units.amount import Amount, Budget
from src.units.spaces import AnyOf
from tests.tiny import tiny_config


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    tokenizer = build_tokenizer()
    tokenizer.padding_side = "right"
    texts = [row["question"] for row in problems("train", 3, 0)]
    rows = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    return {**rows, "labels": labels}


def search(teacher_dir: str, **keys: object) -> MaskSearch:
    keys = {"remove": 2, "draws": 3, **keys}
    made = MaskSearch(teacher_dir, GumbelTopK(init="zeros"), **keys)  # type: ignore[arg-type]
    made.configure_model()
    made._trainer = SimpleNamespace(accumulate_grad_batches=1, global_step=5, world_size=1)  # type: ignore[assignment]
    made.log = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    return made


@pytest.mark.parametrize("k", [10, None])
def test_the_surrogate_has_the_gradient_of_the_mean_loss(
    teacher_dir: str, batch: dict[str, torch.Tensor], k: int | None
) -> None:
    """Taking each draw's gradient at once equals one backward pass through all draws."""
    made = search(teacher_dir, distillation=Distillation(k=k, weight="none"))
    (grad,) = torch.autograd.grad(made.training_step(batch, 0), made.policy.logits)

    from src.data.batches import Supervised

    signal = made.teacher_signal(rows := Supervised.of(batch))
    losses = [made.divergence(rows, signal, made.policy.sample(5, d)) for d in range(3)]
    (direct,) = torch.autograd.grad(torch.stack(losses).mean(), made.policy.logits)
    torch.testing.assert_close(grad, direct, rtol=1e-5, atol=1e-9)
    assert grad.abs().max() > 0


def test_weights_stay_and_only_logits_are_in_the_module(
    teacher_dir: str, batch: dict[str, torch.Tensor]
) -> None:
    made = search(teacher_dir)
    (network,) = made._frozen
    before = {key: value.clone() for key, value in network.state_dict().items()}
    made.training_step(batch, 0).backward()
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert list(made.state_dict()) == ["policy.logits"]


def test_the_shared_teacher_says_what_a_second_copy_says(
    teacher_dir: str, batch: dict[str, torch.Tensor]
) -> None:
    shared = search(teacher_dir)
    copy = LiveTeacher()
    separate = search(teacher_dir, teacher=copy)
    copy.setup(separate)
    one = torch.autograd.grad(shared.training_step(batch, 0), shared.policy.logits)[0]
    other = torch.autograd.grad(separate.training_step(batch, 0), separate.policy.logits)[0]
    assert torch.equal(one, other)


def test_open_gates_have_no_divergence(teacher_dir: str, batch: dict[str, torch.Tensor]) -> None:
    from src.data.batches import Supervised

    made = search(teacher_dir)
    signal = made.teacher_signal(rows := Supervised.of(batch))
    assert made.divergence(rows, signal, torch.ones(6)).abs() < 1e-6


def test_the_budget_counts_tokens_and_passes(teacher_dir: str, batch: dict[str, torch.Tensor]) -> None:
    made = search(teacher_dir)
    made.training_step(batch, 0)
    assert made.tokens == int(batch["attention_mask"].sum())
    assert made.forward_tokens == made.tokens * (1 + 2 * 3)  # the teacher; three draws, there and back


@pytest.mark.parametrize(
    ("layers", "ratio", "count"), [(16, 0.25, 4), (36, 0.25, 9), (5, 0.01, 1), (7, 0.5, 4)]
)
def test_ratio_to_count(layers: int, ratio: float, count: int) -> None:
    assert Amount(ratio=ratio).of(tiny_config("llama", num_hidden_layers=layers)) == (Budget(count),)


def test_exactly_one_of_count_and_ratio() -> None:
    for given in ((None, None), (2, 0.5)):
        with pytest.raises(ConfigError, match="exactly one"):
            Amount(*given)


def test_polish_reaches_a_local_optimum_and_measures_finalists_only() -> None:
    values = torch.rand(9, generator=torch.Generator().manual_seed(0)).tolist()
    exact: list[tuple[int, ...]] = []

    def measure(masks: Sequence[tuple[int, ...]], quick: bool) -> list[float]:
        if not quick:
            exact.extend(masks)
        return [sum(values[i] for i in range(9) if i not in keep) for keep in masks]

    found = polish((0, 1, 2, 3, 4, 5), AnyOf(9, 6, [0]), measure, finalists=2)
    best = min(itertools.combinations(range(1, 9), 3), key=lambda gone: sum(values[i] for i in gone))
    assert set(range(9)) - set(found) == set(best)
    assert 0 in found
    assert len(set(exact)) <= 2 * 4 + 1


def test_polish_tries_the_swaps_whose_units_promise_most_alone() -> None:
    """Of eight swaps two are measured: layer 4 for 1 gains two, 4 for 3 gains one; all others cost."""
    worth, tried = [5.0, 1.0, 4.0, 2.0, 3.0, 0.0], []

    def measure(masks: Sequence[tuple[int, ...]], quick: bool) -> list[float]:
        swapped = [keep for keep in masks if len(keep) == 4 and keep != (0, 1, 2, 3)]
        tried.extend(swapped)
        return [9.0 if keep in swapped else -sum(worth[unit] for unit in keep) for keep in masks]

    assert polish((0, 1, 2, 3), AnyOf(6, 4), measure, swaps=4) == (0, 1, 2, 3)
    assert set(tried) == {(0, 2, 3, 4), (0, 1, 2, 4)}


def test_the_mask_pins_the_revision_of_the_hub_that_was_loaded(
    teacher_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it a model card names a parent that may have changed since."""
    from src.training import sized as module

    plain = module.load_config

    def from_the_hub(name: str, revision: str | None = None) -> object:
        config = plain(name, revision)
        config._commit_hash = "0123abc"
        return config

    monkeypatch.setattr(module, "load_config", from_the_hub)
    keep = (0, 1, 2, 3)
    assert search(teacher_dir).mask(keep, {}).revision == "0123abc"
    monkeypatch.undo()
    assert search(teacher_dir).mask(keep, {}).revision is None
