"""Laws of the density term: by hand, against what transformers computes, and what changes nothing."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from src.data.batches import Supervised, supervised
from src.errors import ConfigError
from src.losses import Density, Distillation, HiddenStates, Weighted
from src.losses.terms import Step
from src.mask import Mask
from src.models.layers import decoder_layers
from src.models.streams import inputs
from src.recover import Recovery
from src.training.ranks import WholeBatch
from src.units.width import feed_forward_writers
from tests.numerics.test_terms import close, graded, recovery
from tests.tiny import FAMILIES, problem_rows, tiny_config, tiny_ids, tiny_model

Batch = dict[str, Tensor]
EPS = 0.01


@pytest.fixture(scope="module")
def rows() -> Batch:
    return problem_rows(5, prompt=3)


def density(weight: float = 1.0) -> Weighted:
    return Weighted(Density(EPS), weight)


def step_of(*activations: Tensor, whole: WholeBatch | None = None) -> Step:
    """A step that knows nothing but activations."""
    hidden_NH = torch.zeros(len(activations[0]), 2)
    mask = Mask.by_hand("m", 4, range(len(activations)))
    return Step(None, hidden_NH, None, None, mask, whole, activations=dict(enumerate(activations)))  # type: ignore[arg-type]


def hooks(model: PreTrainedModel) -> int:
    return sum(len(part._forward_pre_hooks) + len(part._forward_hooks) for part in model.modules())


# ---------------------------------------------------------------- by hand


def test_two_layers_worked_by_hand() -> None:
    """Entries 0, sqrt(eps), 3 sqrt(eps), huge count 0, 1/2, 9/10, 1; a narrow layer weighs the same."""
    root = EPS**0.5
    first = torch.tensor([[0.0, root, -3 * root, 1e6]])
    second = torch.tensor([[-root, 0.0]])
    out = Density(EPS, threshold=0.2).loss(step_of(first, second))
    torch.testing.assert_close(out["loss"], torch.tensor(((0 + 0.5 + 0.9 + 1) / 4 + 0.5 / 2) / 2))
    assert out["density"] == out["loss"]
    torch.testing.assert_close(out["active"], torch.tensor((2 / 4 + 0 / 2) / 2))  # 0.3 and 1e6 lie above 0.2


def test_it_is_zero_for_zeros_and_one_for_large_ones() -> None:
    assert Density(EPS).loss(step_of(torch.zeros(3, 5)))["loss"] == 0
    torch.testing.assert_close(Density(EPS).loss(step_of(torch.full((3, 5), 1e4)))["loss"], torch.tensor(1.0))


@pytest.mark.parametrize("eps", [1e-3, 1e-2])
def test_its_gradient_is_the_formulas_and_fades_far_above_the_root(eps: float) -> None:
    """``2 a eps / (a^2 + eps)^2``; of 1e-7, as the paper's code has it, nothing is left at a = 0.3."""
    a_NF = torch.randn(6, 5, dtype=torch.float64).float().requires_grad_()
    Density(eps).loss(step_of(a_NF))["loss"].backward()
    expected = 2 * a_NF * eps / (a_NF.square() + eps).square() / a_NF.numel()
    torch.testing.assert_close(a_NF.grad, expected.detach(), rtol=1e-4, atol=1e-8)
    ends = torch.tensor([[0.3]], requires_grad=True)
    sizes = []
    for each in (1e-7, eps):
        (grad,) = torch.autograd.grad(Density(each).loss(step_of(ends))["loss"], ends)
        sizes.append(float(grad))
    assert sizes[0] < 1e-4 < 1e-2 < sizes[1]


def test_half_precision_is_counted_in_float32() -> None:
    """Squares of 1e-5 are zero in float16."""
    a_NF = torch.full((2, 3), 1e-5, dtype=torch.float16)
    out = Density(eps=1e-9).loss(step_of(a_NF))["loss"]
    expected = a_NF.double().square() / (a_NF.double().square() + 1e-9)
    torch.testing.assert_close(out, expected.mean().float())


def test_ranks_of_different_length_give_the_mean_over_all_positions() -> None:
    a_NF, whole = torch.randn(7, 4), WholeBatch(0, 0, "cpu")
    whole.share = 7 / 2  # of two ranks
    parts = [Density(EPS).loss(step_of(part, whole=whole)) for part in a_NF.split([2, 5])]
    one = Density(EPS).loss(step_of(a_NF))
    for key in ("loss", "density", "active"):
        torch.testing.assert_close(torch.stack([part[key] for part in parts]).mean(), one[key])


# ---------------------------------------------------------------- in models


def act_inputs(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """What ends each feed-forward, from its own parts: without a gate act(x W), with one the product."""
    found: list[Tensor] = []
    for layer in decoder_layers(model)[1]:
        mlp = getattr(layer, "mlp", layer)

        def product(module: Any, args: Any, mlp: Any = mlp) -> None:
            if hasattr(mlp, "gate_proj"):
                found.append(mlp.act_fn(mlp.gate_proj(args[0])) * mlp.up_proj(args[0]))

        if hasattr(mlp, "gate_proj"):
            mlp.register_forward_pre_hook(product)
        else:
            act = next(part for name, part in mlp.named_modules() if name in ("act", "activation_fn"))
            act.register_forward_hook(lambda _m, _a, out: found.append(out))
    model(ids)
    return found


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "opt", "gpt_neox", "phi", "cohere2"])
def test_what_is_read_is_the_activation_in_every_family(family: str) -> None:
    model, ids = tiny_model(family), tiny_ids()
    paths = dict(enumerate(feed_forward_writers(model.config)))
    before = hooks(model)
    with inputs(model, paths) as read:
        model(ids)
    assert hooks(model) == before
    expected = act_inputs(model, ids)
    assert len(read) == len(expected) == len(paths)
    for index, a in enumerate(expected):
        torch.testing.assert_close(read[index].flatten(0, -2), a.flatten(0, -2))


@pytest.mark.parametrize("family", ["mixtral", "phi3", "bloom", "mamba"])
def test_a_family_without_such_maps_is_refused_with_the_reason(family: str) -> None:
    assert family in FAMILIES
    with pytest.raises(
        ConfigError, match=f"terms: activations .* '{family}', of which a layer .*Leave out"
    ) as told:
        feed_forward_writers(tiny_config(family))
    assert "cannot go alone" not in str(told.value)


@pytest.mark.parametrize("scope", ["full", "cut_adjacent", "lora"])
def test_it_is_its_formula_in_every_scope_and_leaves_no_hook(scope: Any, mask_file: str, rows: Batch) -> None:
    """From the products that the student's own parts compute, at the supervised positions alone."""
    made = recovery(mask_file, density(), scope=scope)
    before = hooks(made.model)
    out = made.losses(Supervised.of(rows))
    assert hooks(made.model) == before
    index, inside = supervised(rows["labels"]), {k: rows[k] for k in ("input_ids", "attention_mask")}
    products: list[Tensor] = []
    for layer in decoder_layers(made.model)[1]:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _m, args: products.append(args[0]))
    made.model(**inside)
    shares = [a.flatten(0, 1)[index].square() / (a.flatten(0, 1)[index].square() + EPS) for a in products]
    torch.testing.assert_close(out["loss"], torch.stack([s.mean() for s in shares]).mean())
    assert 0 < out["loss"] < 1
    made.zero_grad()
    out["loss"].backward()
    trained = {n for n, p in made.named_parameters() if p.requires_grad and p.grad is not None}
    moved = {n for n in trained if made.get_parameter(n).grad.abs().sum() > 0}  # type: ignore[union-attr]
    assert any("mlp" in name for name in moved)
    last = [n for n in moved if ".layers.3." in n]
    assert not any("down_proj" in name for name in last), "behind the last activation nothing learns by it"


def test_weight_zero_changes_neither_loss_nor_gradient_and_is_logged(mask_file: str, rows: Batch) -> None:
    plain, watched = recovery(mask_file), recovery(mask_file, density(0.0), distillation=Distillation())
    one, other = graded(plain, rows), graded(watched, rows)
    assert torch.equal(one[0], other[0])
    assert all(torch.equal(grad, other[1][name]) for name, grad in one[1].items())
    figures = watched.losses(Supervised.of(rows))
    assert 0 < figures["density"] < 1
    assert 0 < figures["active"] < 1
    with pytest.raises(ConfigError, match="terms: weight: 0 given to every term"):
        Recovery(mask_file, terms=[density(0.0)])
    with pytest.raises(ConfigError, match="terms: weight: -1"):
        density(-1)


def test_padding_packing_and_micro_batches_change_nothing(mask_file: str, rows: Batch) -> None:
    made = recovery(mask_file, density(), Weighted(Distillation(weight="none"), 0.5))
    whole = graded(made, rows)
    filled = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    close(
        whole, graded(made, {k: torch.nn.functional.pad(v, (0, 7), value=filled[k]) for k, v in rows.items()})
    )
    lengths = rows["attention_mask"].sum(1).tolist()
    packed = {
        key: torch.cat([row[:n] for row, n in zip(rows[key], lengths, strict=True)])[None]
        for key in ("input_ids", "labels")
    }
    packed["labels"][0, [0, *itertools.accumulate(lengths)][:-1]] = -100
    packed["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    close(whole, graded(made, packed))
    parts = [{k: v[at] for k, v in rows.items()} for at in (slice(0, 2), slice(2, 5))]
    counts = [len(supervised(part["labels"])) for part in parts]
    shares = [(count / sum(counts), graded(made, part)) for count, part in zip(counts, parts, strict=True)]
    value = sum(share * found[0] for share, found in shares)
    grads = {name: sum(share * found[1][name] for share, found in shares) for name in whole[1]}
    close(whole, (value, grads))  # type: ignore[arg-type]


@pytest.mark.parametrize("scope", ["full", "lora"])
def test_recomputed_activations_change_nothing_and_count_once(
    scope: Any, mask_file: str, rows: Batch
) -> None:
    """The backward pass runs the layers again; the term has counted by then, and its hooks are gone."""
    torch.manual_seed(0)
    plain = recovery(mask_file, density(), scope=scope)
    torch.manual_seed(0)
    again = recovery(mask_file, density(), scope=scope, checkpoint_activations=True)
    one, other = graded(plain, rows), graded(again, rows)
    assert torch.equal(one[0], other[0])
    close(one, other)
    assert all(
        (one[1][name] != 0).any() == (grad != 0).any() for name, grad in other[1].items()
    )  # what learns is the same


def test_units_that_close_slowly_are_not_counted(mask_file: str, rows: Batch) -> None:
    """With the removed units still open, those of the kept ones are counted, at their places among all."""
    made = recovery(mask_file, density(0.0), distillation=Distillation(), closing=0.5)
    assert made.opened is not None
    made.train()
    made.opened.gate = 0.3
    with inputs(made.opened.model, dict.fromkeys((0, 2, 3, 5), "mlp.down_proj")) as read:
        found = made.step(Supervised.of(rows)).activations
    index = supervised(rows["labels"])
    assert list(found) == [0, 1, 2, 3]
    for position, home in enumerate((0, 2, 3, 5)):
        assert torch.equal(found[position], read[home].flatten(0, 1)[index])
    made.opened.gate = 1e-7
    nearly, made.opened = made.losses(Supervised.of(rows)), None
    closed = made.losses(Supervised.of(rows))
    torch.testing.assert_close(nearly["density"], closed["density"], rtol=1e-4, atol=1e-6)


def test_no_supervised_position_gives_zero_not_nan(mask_file: str, rows: Batch) -> None:
    value, grads = graded(
        recovery(mask_file, density()), {**rows, "labels": torch.full_like(rows["labels"], -100)}
    )
    assert value == 0
    assert all((grad == 0).all() for grad in grads.values())


def test_nothing_is_read_where_no_term_asks(mask_file: str, rows: Batch) -> None:
    made = recovery(mask_file, Weighted(HiddenStates()))
    assert made.writers == ()
    assert not made.step(Supervised.of(rows), pairs=made.objective.pairs(made.mask)).activations
    assert made.objective.measured(made.step(Supervised.of(rows))) == {}
