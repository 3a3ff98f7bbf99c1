"""Masks of a step that share what they compute: each loss and gradient to the last bit, for fewer layers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from src.data.batches import Supervised
from src.losses.distill import Distillation
from src.mask import Unit
from src.models.mixing import mix
from src.policies import BypassBP, GumbelTopK
from src.policies.draws import Draw, apart, together
from src.search import MaskSearch
from src.teachers import LiveTeacher
from src.training.adapters import Scales
from tests.numerics.test_search import batch, search  # noqa: F401 (a fixture)

L = 6


def closing(unit: Unit, *removed: tuple[int, ...]) -> list[Tensor]:
    units = L if unit == "layer" else 2 * L
    return [torch.ones(units).index_fill(0, torch.tensor(gone), 0.0) for gone in removed]


DRAWN: dict[Unit, list[tuple[int, ...]]] = {
    "layer": [(1, 4), (3, 5), (1, 4), (3, 4), (0, 2), (4, 5)],
    "half": [(2, 7), (2, 9), (6, 11), (2, 7), (0, 1), (7, 10)],
}
"""Masks that begin alike, two that are equal, one that begins at the first layer."""


def equal(ours: list[Draw], theirs: list[Draw], drawn: list[Tensor]) -> None:
    for one, other, gates_U in zip(ours, theirs, drawn, strict=True):
        assert one.gates_U is gates_U
        assert torch.equal(one.loss, other.loss)
        if other.grad_U is None:
            assert one.grad_U is None
        else:
            assert one.grad_U is not None
            assert torch.equal(one.grad_U, other.grad_U)
            assert (one.grad_U != 0).all(), "every gate has its gradient"


@pytest.mark.parametrize("unit", ["layer", "half"])
@pytest.mark.parametrize("k", [10, None])
def test_what_is_shared_changes_no_bit(
    unit: Unit, k: int | None, teacher_dir: str, batch: dict[str, Tensor]  # noqa: F811
) -> None:  # fmt: skip
    made = search(teacher_dir, unit=unit, distillation=Distillation(k=k, weight="none"))
    rows, drawn = Supervised.of(batch), closing(unit, *DRAWN[unit])
    drawn.insert(2, torch.linspace(1.0, 0.25, len(drawn[0])))  # begins open, goes on soft
    equal(together(made, rows, drawn), apart(made, rows, drawn), drawn)


def test_a_teacher_of_its_own_and_a_policy_without_gradients_share_too(
    teacher_dir: str, batch: dict[str, Tensor]  # noqa: F811
) -> None:  # fmt: skip
    rows, drawn = Supervised.of(batch), closing("layer", *DRAWN["layer"])
    copy = LiveTeacher()
    separate = search(teacher_dir, teacher=copy)
    copy.setup(separate)
    equal(together(separate, rows, drawn), apart(separate, rows, drawn), drawn)
    blind = search(teacher_dir)
    blind.policy = BypassBP()
    equal(together(blind, rows, drawn), apart(blind, rows, drawn), drawn)


def test_a_step_runs_what_is_shared_once(teacher_dir: str, batch: dict[str, Tensor]) -> None:  # noqa: F811
    """By hand: the masks go (4 5) (3 5) (3 4) (1 4) (0 2), each from its first layer that differs.

    The output of that layer, closed now and open before, is known: 1, 2, 1, 4 and 5 layers are left.
    """
    made = search(teacher_dir)
    rows, drawn = Supervised.of(batch), closing("layer", *DRAWN["layer"])
    before = made.gates.evaluated
    together(made, rows, drawn)
    assert made.gates.evaluated - before == L + (1 + 2 + 1 + 4 + 5)
    before = made.gates.evaluated
    apart(made, rows, drawn)
    assert made.gates.evaluated - before == L + 6 * L


def test_the_graph_of_a_mask_is_gone_before_the_next_is_measured(
    teacher_dir: str, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    made, graphs = search(teacher_dir), list[weakref.ref[Tensor]]()
    plain = made.divergence

    def divergence(*args: Any, **keys: Any) -> Tensor:
        assert all(graph() is None for graph in graphs)
        loss = plain(*args, **keys)
        graphs.append(weakref.ref(loss))
        return loss

    monkeypatch.setattr(made, "divergence", divergence)
    together(made, Supervised.of(batch), closing("layer", *DRAWN["layer"]))
    assert len(graphs) == 5


def test_a_search_learns_the_same_logits(teacher_dir: str, batch: dict[str, Tensor]) -> None:  # noqa: F811
    def learned(shares: bool) -> tuple[Tensor, float]:
        made = search(teacher_dir)
        made.shares, adam = shares, torch.optim.Adam(made.policy.parameters(), lr=0.5)
        for step in range(3):
            made.trainer.global_step = step  # type: ignore[misc]
            adam.zero_grad()
            made.training_step(batch, 0).backward()
            adam.step()
        return made.policy.logits.detach().clone(), made.forward_tokens

    (ours, cost), (theirs, whole) = learned(True), learned(False)
    assert torch.equal(ours, theirs)
    assert cost < whole


def test_a_search_shares_where_it_may(teacher_dir: str) -> None:
    cases: tuple[tuple[dict[str, Any], bool], ...] = (
        ({}, True), ({"unit": "half"}, True), ({"checkpoint_activations": True}, False),
        ({"adapters": Scales()}, False),
    )  # fmt: skip
    for keys, shares in cases:
        one = MaskSearch(teacher_dir, GumbelTopK(), remove=2, **keys)
        one.configure_model()
        one.check = lambda: None  # type: ignore[method-assign]
        one.on_fit_start()
        assert one.shares is shares


@pytest.mark.parametrize("shape", [(), (3, 1, 1)])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.3])
def test_a_switch_is_the_lerp_in_value_and_gradients(shape: tuple[int, ...], value: float) -> None:
    generator = torch.Generator().manual_seed(0)
    states, weight_BTH = (
        torch.randn(2, 3, 5, 8, generator=generator),
        torch.randn(3, 5, 8, generator=generator),
    )

    def gradients(blend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Iterator[Tensor]:
        h_in, h_out = (h.clone().requires_grad_() for h in states)
        gate = torch.full(shape, value, requires_grad=True)
        mixed = blend(h_in, h_out, gate)
        yield mixed
        for grad in torch.autograd.grad((mixed * weight_BTH).sum(), (h_in, h_out, gate), allow_unused=True):
            yield torch.zeros(()) if grad is None else grad

    ours = gradients(lambda h_in, h_out, gate: mix(h_in, h_out, gate, value))
    for one, other in zip(ours, gradients(torch.lerp), strict=True):
        assert torch.equal(one.expand_as(other), other)
