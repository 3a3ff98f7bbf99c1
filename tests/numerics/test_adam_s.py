"""Laws of AdamS: what is masked, by hand; Adam without masks; kept weights in peace; factors that fold."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from src.errors import ConfigError
from src.models.two_four import crowded, linear_maps, two_of_four
from src.optim import AdamS
from tests.tiny import tiny_model


def sparse(values: Tensor, axis: int = 1, **keys: Any) -> tuple[nn.Parameter, AdamS]:
    p = nn.Parameter(values.clone())
    optimizer = AdamS([p], **{"lr": 0.01, "scaled": False, **keys})
    optimizer.sparsify({p: axis})
    return p, optimizer


def stepped(optimizer: AdamS, p: nn.Parameter, grad: Tensor, ramp: float) -> None:
    optimizer.ramp(ramp)
    p.grad = grad.clone()
    optimizer.step()


# ---------------------------------------------------------------- the pattern


def test_the_two_largest_of_each_four_along_the_input_stay() -> None:
    weight = torch.tensor([[3.0, -4, 1, 2, 0, 0.1, -0.3, 0.2], [1, 1.5, -9, 8, 5, 6, 7, 8]])
    expected = torch.tensor([[1, 1, 0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0, 1, 1]]).bool()
    assert torch.equal(two_of_four(weight, 1), expected)
    assert torch.equal(two_of_four(weight.T, 0), expected.T)
    assert two_of_four(torch.zeros(3, 8), 1).unflatten(1, (-1, 4)).sum(-1).eq(2).all(), "ties keep two, too"


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "opt", "mixtral"])
def test_it_is_for_the_linear_maps_of_the_layers(family: str) -> None:
    """GPT-2 has its input axis first; embeddings, head, norms, biases and stacked experts stay dense."""
    model = tiny_model(family)
    maps = linear_maps(model)
    assert {axis for _, axis in maps.values()} == {0 if family == "gpt2" else 1}
    embedding = model.get_input_embeddings().weight
    assert not any(weight is embedding or weight.ndim != 2 for weight, _ in maps.values())
    assert any("attn" in name or "attention" in name for name in maps)
    groups = sum(weight.numel() // 4 for weight, _ in maps.values())
    assert crowded(model) == groups, "none is zero at first"
    with torch.no_grad():
        for weight, axis in maps.values():
            weight.mul_(two_of_four(weight, axis))
        assert crowded(model) == 0
        weight, axis = next(iter(maps.values()))
        weight.movedim(axis, -1)[0, :3] = 1.0
    assert crowded(model) == 1


def test_maps_of_other_widths_are_left_out() -> None:
    model = tiny_model("qwen3", intermediate_size=46)
    names = {name.rpartition(".")[2] for name in linear_maps(model)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}  # down_proj reads 46


# ---------------------------------------------------------------- the step


def test_without_masks_it_is_adam_bit_for_bit() -> None:
    torch.manual_seed(0)
    own = [nn.Parameter(torch.randn(5, 8)), nn.Parameter(torch.randn(3))]
    theirs = [nn.Parameter(p.detach().clone()) for p in own]
    keys: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6}
    ours, torchs = AdamS(own, penalty=1.0, **keys), torch.optim.Adam(theirs, **keys)
    for step in range(30):
        ours.ramp(step / 30)
        for p, q in zip(own, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        torchs.step()
    for p, q in zip(own, theirs, strict=True):
        assert torch.equal(p, q)


def test_two_steps_are_the_equations_by_hand() -> None:
    """One four: 0.1 and -0.2 are masked, 1 and 2 kept; the ramp at 1/4, then at 1/2; numbers of Python."""
    lr, b1, b2, eps, penalty = 0.01, 0.9, 0.95, 1e-8, 0.3
    p, optimizer = sparse(
        torch.tensor([[1.0, 0.1, 2.0, -0.2]], dtype=torch.float64), betas=(b1, b2), eps=eps, penalty=penalty
    )
    weights, masked = [1.0, 0.1, 2.0, -0.2], [0, 1, 0, 1]
    means, squares = [0.0] * 4, [0.0] * 4
    for t, (a, grads) in enumerate([(0.25, [0.5, -1.0, 2.0, 0.1]), (0.5, [0.2, 0.4, -1.0, 0.3])], 1):
        stepped(optimizer, p, torch.tensor([grads], dtype=torch.float64), a)
        for i, (w, m, g) in enumerate(zip(weights, masked, grads, strict=True)):
            g, pull = (1 - a * m) * g, m * a * penalty
            means[i] = b1 * means[i] + (1 - b1) * g
            squares[i] = b2 * squares[i] + (1 - b2) * (g**2 + pull**2)
            update = means[i] / (1 - b1**t) + pull * (1 if w > 0 else -1)
            weights[i] = w - lr * update / ((squares[i] / (1 - b2**t)) ** 0.5 + eps)
        torch.testing.assert_close(p.detach(), torch.tensor([weights], dtype=torch.float64))


def test_kept_weights_are_not_penalised_and_masked_ones_fall_to_zero() -> None:
    """Without a gradient the kept ones do not move by a bit; a small one stops at zero and stays there."""
    start = torch.tensor([[1.0, 0.5, -0.02, 2.0]])
    p, optimizer = sparse(start, lr=1e-3)
    for step in range(1000):
        stepped(optimizer, p, torch.zeros_like(p), (step + 1) / 1000)
    assert torch.equal(p[0, [0, 3]], start[0, [0, 3]])
    assert 0 <= p[0, 1] < 1e-3
    assert p[0, 2] == 0
    gone, whole = float(p[0, 1] ** 2 + p[0, 2] ** 2), float(p.square().sum())
    assert optimizer.harden() == pytest.approx(gone / whole, rel=1e-5)
    assert torch.equal(p.detach(), start * torch.tensor([[1, 0, 0, 1]]))
    assert optimizer.harden() == 0


def test_kept_weights_make_adams_steps_beside_masked_ones() -> None:
    """The same numbers as torch's Adam on the same gradients, whatever becomes of the others."""
    torch.manual_seed(0)
    start = torch.tensor([[1.0, 0.01, -2.0, 0.02], [0.03, 3.0, 0.01, -4.0]])
    p, optimizer = sparse(start, betas=(0.8, 0.95))
    q = nn.Parameter(start.clone())
    adam, kept = torch.optim.Adam([q], lr=0.01, betas=(0.8, 0.95)), two_of_four(start, 1)
    for step in range(20):
        grad = torch.randn_like(p)
        stepped(optimizer, p, grad, (step + 1) / 20)
        q.grad = grad
        adam.step()
    torch.testing.assert_close(p[kept], q[kept], rtol=1e-6, atol=1e-7)
    assert (p[~kept] - q[~kept]).abs().max() > 0.01


def test_a_faded_gradient_moves_a_masked_weight_less_and_less() -> None:
    """At the end of the ramp none of it is left: a weight at zero stays there, whatever its gradient."""
    lengths = []
    for ramp in (0.5, 0.9, 1.0):
        p, optimizer = sparse(torch.tensor([[1.0, 0.0, 2.0, 0.0]]), penalty=0.1)
        stepped(optimizer, p, torch.full((1, 4), 0.05), ramp)
        lengths.append(abs(float(p[0, 1])))
    assert lengths[0] > lengths[1] > lengths[2] == 0


def test_masks_are_renewed_when_it_is_time_and_not_before() -> None:
    """A weight that has grown past a kept one is still pushed down until the renewal, and never after."""
    p, optimizer = sparse(torch.tensor([[1.0, 0.9, 0.5, 0.1]]), renew=3)
    stepped(optimizer, p, torch.zeros_like(p), 1.0)
    with torch.no_grad():
        p[0, 2] = 5.0
    for step, pushed in ((2, True), (3, True), (4, False), (5, False)):
        before = float(p[0, 2])
        stepped(optimizer, p, torch.zeros_like(p), 1.0)
        assert (float(p[0, 2]) < before - 0.005) is pushed, step
    assert optimizer.state[p]["kept"].tolist() == [[True, False, True, False]]


@pytest.mark.parametrize("axis", [0, 1])
def test_factors_are_those_of_a_module_that_scales_its_outputs(axis: int) -> None:
    """``exp(s) (W x)`` with W under AdamS and s under Adam, by autograd: the folded weight is the same."""
    torch.manual_seed(0)
    keys: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.95), "penalty": 0.1, "renew": 4}
    weight, x, y = (
        torch.randn(3, 8, dtype=torch.float64),
        torch.randn(9, 8).double(),
        torch.randn(9, 3).double(),
    )
    folded, folding = sparse(weight if axis else weight.T, axis, scaled=True, **keys)
    inner, plain = sparse(weight, **keys)
    s = nn.Parameter(torch.zeros(3, 1, dtype=torch.float64))
    adam = torch.optim.Adam([s], lr=keys["lr"], betas=keys["betas"])
    for step in range(12):
        ((x @ (folded.T if axis else folded) - y) ** 2).mean().backward()
        ((x @ (s.exp() * inner).T - y) ** 2).mean().backward()
        for optimizer in (folding, plain):
            optimizer.ramp((step + 1) / 12)
        for each in (folding, plain, adam):
            each.step()
            each.zero_grad()
        expected = (s.exp() * inner).detach()
        torch.testing.assert_close(folded.detach() if axis else folded.detach().T, expected)
    assert s.abs().max() > 0.05, "the factors move"


def test_zero_masked_weights_need_no_factor_to_stay_zero() -> None:
    p, optimizer = sparse(torch.tensor([[1.0, 0.0, -2.0, 0.0]]), scaled=True)
    for _ in range(5):
        stepped(optimizer, p, torch.tensor([[0.3, 0.0, 0.1, 0.0]]), 1.0)
    assert p[0, 1] == p[0, 3] == 0
    assert optimizer.state[p]["scale"].abs() > 0


def test_a_saved_state_goes_on_bit_for_bit_and_masks_stay_bool() -> None:
    """Between two renewals, where the mask is not that of the present weights."""
    torch.manual_seed(0)
    grads, start = torch.randn(9, 4, 8), torch.randn(4, 8)
    p, optimizer = sparse(start, renew=5, scaled=True, lr=0.3)
    for step in range(3):
        stepped(optimizer, p, grads[step], step / 9)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    q, resumed = sparse(p.detach(), renew=5, scaled=True, lr=0.3)
    buffer.seek(0)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert resumed.state[q]["kept"].dtype == torch.bool
    assert not torch.equal(resumed.state[q]["kept"], two_of_four(q, 1)), "a renewed mask would be another"
    for step in range(3, 9):
        stepped(optimizer, p, grads[step], step / 9)
        stepped(resumed, q, grads[step], step / 9)
    assert torch.equal(p, q)


def test_settings_are_checked_and_a_closure_is_heeded() -> None:
    with pytest.raises(ConfigError, match="betas"):
        AdamS([nn.Parameter(torch.zeros(1))], betas=(0.9, 1.0))
    with pytest.raises(ConfigError, match="renew: 0"):
        AdamS([nn.Parameter(torch.zeros(1))], renew=0)
    p = nn.Parameter(torch.ones(1))

    def closure() -> Tensor:
        p.grad = None
        loss = (3 * p).sum()
        loss.backward()
        return loss

    assert AdamS([p], lr=0.1).step(closure) == 3
    torch.testing.assert_close(p.detach(), torch.tensor([0.9]))
