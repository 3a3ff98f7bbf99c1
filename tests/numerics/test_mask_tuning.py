"""Laws of mask tuning: its closed form, known scales found again, and what it must not touch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from src.errors import ConfigError
from src.mask import Mask, Unit
from src.models.cut import cut
from src.models.layers import decoder_layers
from src.models.streams import inputs, silenced
from src.repair import mask_tuning
from src.repair.fold import Regression, Repair
from src.repair.mask_tuning import MaskTuning, places
from src.repair.stream import run
from tests.numerics.test_repair import batch_of, logits
from tests.tiny import LAYERS, mask_of, tiny_model


def tuning(**keys: Any) -> MaskTuning:
    return MaskTuning("rows", device="cpu", **keys)


def case(parts: int = 4, each: int = 3, tokens: int = 50, seed: int = 0) -> tuple[Tensor, ...]:
    """Features ``[N, F]`` of some tokens, what each adds to the stream ``[F, H]``, weights of the tokens."""
    generator = torch.Generator().manual_seed(seed)
    a_NF = torch.randn(tokens, parts * each, generator=generator).double()
    map_FH = torch.randn(parts * each, 8, generator=generator).double()
    return a_NF, map_FH, torch.rand(tokens, generator=generator).double() + 0.1


def solved(
    a_NF: Tensor, map_FH: Tensor, lack_NH: Tensor, weight_N: Tensor, each: int, split: int = 1, **keys: Any
) -> Tensor:
    """The scales ``[P]`` of parts, from sums over the tokens in ``split`` batches."""
    regression = Regression()
    for chunk in zip(a_NF.chunk(split), lack_NH.chunk(split), weight_N.chunk(split), strict=True):
        regression.add(*chunk)
    x_F = 1 + tuning(**keys).rise(regression, map_FH, each)
    assert torch.equal(x_F.view(-1, each), x_F.view(-1, each)[:, :1].expand(-1, each)), "one for each part"
    return x_F[::each]


# ---------------------------------------------------------------------- the equations


@pytest.mark.parametrize(("ridge", "low", "high"), [(0, 0.8, 0.8), (1, 0.799, 0.801), (1e6, 1, 1)])
def test_a_stream_that_is_a_fifth_too_large_is_scaled_to_four_fifths(
    ridge: float, low: float, high: float
) -> None:
    """The paper's damping acts on sums over tokens: 1 is little beside those of 50, 1e6 leaves all at 1."""
    a_NF, map_FH, weight_N = case()
    lack_NH = -0.2 * a_NF @ map_FH
    x_P = solved(a_NF, map_FH, lack_NH, weight_N, 3, ridge=ridge, normalise=False)
    assert low - 1e-6 <= float(x_P.min()) <= float(x_P.max()) <= high + 1e-6


@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.parametrize("ridge", [0.3, 30.0])
def test_the_solution_is_the_paper_s_closed_form(each: int, ridge: float) -> None:
    """With A written out: a row for each token and hidden channel, a column for each part."""
    a_NF, map_FH, weight_N = case(12 // each, each)
    lack_NH = case(tokens=50, seed=1)[0][:, :8]
    root_N = weight_N.sqrt()
    columns = [
        ((a_NF[:, p : p + each] @ map_FH[p : p + each]) * root_N[:, None]).flatten()
        for p in range(0, 12, each)
    ]
    a_RP = torch.stack(columns, 1)
    m_PP, r_P = a_RP.T @ a_RP, a_RP.T @ (lack_NH * root_N[:, None]).flatten()
    expected = 1 + torch.linalg.inv(m_PP.T @ m_PP + ridge**2 * torch.eye(len(r_P))) @ m_PP.T @ r_P
    found = solved(a_NF, map_FH, lack_NH, weight_N, each, ridge=ridge, normalise=False)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_sums_over_batches_are_the_sums_over_all_tokens() -> None:
    a_NF, map_FH, weight_N = case()
    lack_NH = case(seed=1)[0][:, :8]
    whole = solved(a_NF, map_FH, lack_NH, weight_N, 3)
    torch.testing.assert_close(solved(a_NF, map_FH, lack_NH, weight_N, 3, split=7), whole, rtol=1e-9, atol=0)


@pytest.mark.parametrize("normalise", [True, False])
def test_normalised_the_ridge_depends_neither_on_the_tokens_nor_on_the_stream_s_size(
    normalise: bool,
) -> None:
    a_NF, map_FH, weight_N = case()
    lack_NH = case(seed=1)[0][:, :8]
    keys = {"ridge": 0.5 if normalise else 500.0, "normalise": normalise}
    once = solved(a_NF, map_FH, lack_NH, weight_N, 3, **keys)
    twice = solved(a_NF.repeat(2, 1), map_FH, lack_NH.repeat(2, 1), weight_N.repeat(2), 3, **keys)
    larger = solved(a_NF, 10 * map_FH, 10 * lack_NH, weight_N, 3, **keys)
    for other in (twice, larger):
        assert torch.allclose(other, once, rtol=1e-9) is normalise


def test_a_part_that_never_fires_keeps_its_scale() -> None:
    a_NF, map_FH, weight_N = case()
    a_NF[:, 3:6] = 0
    x_P = solved(a_NF, map_FH, -0.2 * a_NF @ map_FH, weight_N, 3, ridge=0)
    torch.testing.assert_close(x_P, torch.tensor([0.8, 1.0, 0.8, 0.8]).double())


# ---------------------------------------------------------------------- models


def wide(keep: int = 48, unit: Unit = "channel", width: int = 48) -> Mask:
    units = tuple(layer * width + own for layer in range(LAYERS) for own in range(keep))
    return Mask("m", LAYERS, units, "by hand", unit=unit, width=width)


def tuned(
    student: PreTrainedModel, parent: PreTrainedModel, mask: Mask, **keys: Any
) -> tuple[list[Any], dict[str, Tensor]]:
    """Tune in place; return the repairs and the weights as they were."""
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    repairs = tuning(**keys).repair(student, parent, mask, [batch_of(8), batch_of(6, seed=1)])
    after = student.state_dict()
    assert {n: x.shape for n, x in after.items()} == {n: x.shape for n, x in before.items()}
    return repairs, before


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "granite"])
def test_scales_that_were_changed_by_hand_are_found_again(family: str) -> None:
    """Heads of an attention, channels of a feed-forward; in parallel layers, with biases and factors too."""
    parent = tiny_model(family)
    student = copy.deepcopy(parent)
    place = {p.index: p for p in places(student, wide(), batch_of()) if p.silent is None}[3].writer
    attention = next(p for p in places(student, wide(), batch_of()) if p.index == 2 and p.silent).writer
    for writer, factor in ((place, 1.25), (attention, 0.5)):
        map_FH = writer.map_FH
        change_FH = torch.zeros(len(map_FH) + writer.constant, map_FH.shape[1]).double()
        change_FH[: len(map_FH)] = (factor - 1) * map_FH
        writer.add(change_FH)
    assert not torch.allclose(logits(student), logits(parent), atol=1e-2)
    repairs, _ = tuned(student, parent, wide(), ridge=0)
    torch.testing.assert_close(logits(student), logits(parent), rtol=0, atol=2e-3)
    changed = [repair for repair in repairs if repair.before > 1e-9]
    assert [f".{2 + i}." in repair.module for i, repair in enumerate(changed[:2])] == [True, True]


@pytest.mark.parametrize("unit", ["layer", "half", "kv_group", "channel"])
def test_no_place_ends_further_from_the_parent_and_columns_are_scaled_alone(unit: Unit) -> None:
    parent, heads = tiny_model("llama"), 4
    mask = {
        "layer": mask_of((0, 1, 4, 5, 6)),
        "half": Mask("m", LAYERS, (0, 1, 2, 5, 6, 7, 8, 9, 12, 13), "test", unit="half"),
        "kv_group": wide(1, "kv_group", 2),
        "channel": wide(30),
    }[unit]
    student = cut(parent, mask)
    repairs, before = tuned(student, parent, mask)
    assert repairs
    assert all(repair.after <= repair.before for repair in repairs)
    assert sum(repair.after for repair in repairs) < 0.99 * sum(repair.before for repair in repairs)
    named = {f"{repair.module}.weight" for repair in repairs}
    for name, new in student.state_dict().items():
        assert torch.equal(new, before[name]) is (name not in named), name
        if name in named:
            factor_F = (new.double() * before[name]).sum(0) / before[name].double().square().sum(0)
            torch.testing.assert_close(new, (before[name] * factor_F).float(), rtol=1e-4, atol=1e-6)
            if "o_proj" in name:
                own = heads // 2 if unit == "kv_group" else heads
                factor_PE = factor_F.view(own, -1)
                torch.testing.assert_close(
                    factor_PE, factor_PE[:, :1].expand_as(factor_PE), rtol=1e-4, atol=0
                )


def test_each_place_is_to_hold_what_the_next_kept_half_reads_in_the_parent() -> None:
    """Removed: the attention of 2 and 4, the feed-forward of 1 and 4: layer 1 is 1a with 2f."""
    mask = Mask("m", LAYERS, (0, 1, 2, 5, 6, 7, 10, 11, 12, 13), "test", unit="half")
    student = cut(tiny_model("llama"), mask)
    found = [(p.index, p.source, p.silent is not None) for p in places(student, mask, batch_of())]
    # Layer 0 is the parent's. Of layer 1 the attention is to leave what 2f reads, its feed-forward what 3a
    # reads; of layer 2 (3a, 3f) what 3f reads, then what 5a reads: the output of 4. And so on.
    assert found == [
        (1, 2, True), (1, 2, False), (2, 3, True), (2, 4, False), (3, 5, True), (3, 5, False), (4, 6, True),
        (4, 6, False),
    ]  # fmt: skip


def test_layers_in_front_of_the_first_gap_and_the_first_attention_are_left_alone() -> None:
    student = cut(tiny_model("llama"), mask_of((0, 1, 4, 5, 6)))
    found = [(p.index, p.silent is not None) for p in places(student, mask_of((0, 1, 4, 5, 6)), batch_of())]
    assert found[0] == (1, False), "the feed-forward before the gap"
    assert len(found) == 1 + 2 * 3
    every = [(p.index, p.silent is not None) for p in places(tiny_model("llama"), wide(), batch_of())]
    assert every == [(0, False), *((i, early) for i in range(1, LAYERS) for early in (True, False))]


def test_the_target_of_an_attention_is_the_stream_in_front_of_the_feed_forward() -> None:
    """Computed by the layer's own norms: what the parent's post-attention norm gets."""
    parent, batch = tiny_model("llama"), batch_of()
    mask = mask_of((0, 2, 3, 4, 5, 6))
    student = cut(parent, mask)
    place = next(p for p in places(student, mask, batch) if p.silent and p.index == 2)
    seen: dict[str, Tensor] = {}
    for name, model, layer in (("student", student, 2), ("parent", parent, 3)):
        norm = decoder_layers(model)[1][layer].post_attention_layernorm
        norm.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
        real_N = run(model, batch)
    lack_NH = (seen["parent"] - seen["student"]).flatten(0, 1)[real_N].double()
    weight_N = 1 / seen["parent"].flatten(0, 1)[real_N].double().square().sum(-1)
    energy = (weight_N * lack_NH.square().sum(-1)).mean()
    regression = place.lack(student, parent, [batch])
    assert regression.error(torch.zeros_like(regression.cross_FH)) == pytest.approx(float(energy), rel=1e-5)


def test_tuning_ends_at_the_first_scale_that_is_too_large() -> None:
    """A feed-forward that was divided by twenty would need twenty: what comes before it alone is tuned."""
    parent = tiny_model("llama")
    student = cut(parent, wide(40))
    decoder_layers(student)[1][3].mlp.down_proj.weight.data /= 20
    with pytest.warns(UserWarning, match="down_proj in layer 3 would be beyond 10, so tuning ends"):
        repairs, before = tuned(student, parent, wide(40), ridge=1e-4)
    layers = {int(repair.module.split(".")[2]) for repair in repairs}
    assert layers <= {0, 1, 2, 3}
    assert repairs[-1].module.endswith(("3.self_attn.o_proj", "2.mlp.down_proj"))
    assert torch.equal(student.state_dict()["model.layers.3.mlp.down_proj.weight"],
                       before["model.layers.3.mlp.down_proj.weight"])  # fmt: skip


def test_a_mixture_of_experts_is_scaled_by_what_it_writes() -> None:
    parent, mask = tiny_model("mixtral"), mask_of((0, 1, 4, 5, 6))
    student = cut(parent, mask)
    repairs, before = tuned(student, parent, mask)
    assert all(repair.after <= repair.before for repair in repairs)
    (name,) = [n for n in before if n.startswith("model.layers.1.") and
               not torch.equal(before[n], student.state_dict()[n])]  # fmt: skip
    old_EHF, new_EHF = before[name].double(), student.state_dict()[name].double()
    factor_H = (new_EHF * old_EHF).sum((0, 2)) / old_EHF.square().sum((0, 2))
    torch.testing.assert_close(new_EHF, old_EHF * factor_H[None, :, None], rtol=1e-4, atol=1e-6)


def test_a_layer_that_adds_to_the_stream_once_has_one_place_and_a_norm_behind_its_map_none() -> None:
    mask = mask_of((0, 1, 4, 5, 6))
    found = [p.silent for p in places(cut(tiny_model("mamba"), mask), mask, batch_of())]
    assert found == [None] * 4
    with pytest.raises(ConfigError, match="nothing can be folded into layer 1 of this 'gemma2'"):
        next(places(cut(tiny_model("gemma2"), mask), mask, batch_of()))


def test_a_stronger_ridge_moves_the_weights_less_and_the_strongest_not_at_all() -> None:
    parent, mask, moves = tiny_model("llama"), mask_of((0, 1, 2, 3, 4, 6)), list[float]()
    for ridge in (0.1, 10.0, 1e12):
        student = cut(parent, mask)
        _, before = tuned(student, parent, mask, ridge=ridge)
        moves.append(sum(float((x - before[n]).norm()) for n, x in student.state_dict().items()))
    assert moves[0] > moves[1] > 1e-3
    assert moves[2] < 1e-5


# ---------------------------------------------------------------------- the pieces


def test_many_places_are_told_by_their_mean_and_a_few_one_by_one() -> None:
    repair = tuning()
    assert str(repair) == "nothing is repaired"
    repair.repairs = [Repair(f"layers.{i}.down", 0.2 * i, 0.1 * i) for i in range(3)]
    assert str(repair).endswith("layers.1.down 0.2 -> 0.1, layers.2.down 0.4 -> 0.2")
    repair.repairs = [Repair(f"layers.{i}.down", 0.2 * i, 0.1 * i) for i in range(41)]
    assert str(repair).endswith("squared relative error: 4 -> 2 on average over 41 places")


def test_a_silent_module_returns_zeros_in_the_block_only() -> None:
    model = tiny_model("llama")
    plain = logits(model)
    with silenced(decoder_layers(model)[1][2].mlp.down_proj):
        quiet = logits(model)
    assert torch.equal(logits(model), plain)
    decoder_layers(model)[1][2].mlp.down_proj.weight.data.zero_()
    assert torch.equal(logits(model), quiet)


def test_a_pass_ends_behind_the_layer_that_is_wanted() -> None:
    model, batch = tiny_model("llama"), batch_of()
    with inputs(model, dict.fromkeys(range(LAYERS), "")) as whole:
        real_N = run(model, batch)
        expected = dict(whole)
    with inputs(model, dict.fromkeys(range(LAYERS), "")) as part:
        assert torch.equal(run(model, batch, last=3), real_N)
    assert set(part) == {0, 1, 2, 3}
    assert all(torch.equal(part[layer], expected[layer]) for layer in part)
    assert mask_tuning.LARGEST == 10
