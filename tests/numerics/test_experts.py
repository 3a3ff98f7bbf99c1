"""Laws of a linear map folded into a mixture of experts: exact in every layout, or refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from src.errors import ConfigError
from src.models.cut import cut
from src.models.layers import decoder_layers
from src.models.streams import inputs
from src.repair import stream as streams
from src.repair.experts import Mixture, last_weights
from src.repair.fold import fold
from src.repair.stream import StreamRepair, matrices
from src.repair.writers import stream_writer
from tests.numerics.test_repair import MASK, PLACE, batch_of, logits, stream
from tests.tiny import MOE, tiny_model

DOWN = "experts.down_proj"
MIXTURES: dict[str, dict[str, int]] = {  # the axis of each weight that takes the map
    "mixtral": {DOWN: 1},
    "olmoe": {DOWN: 1},
    "qwen2_moe": {DOWN: 1, "shared_expert.down_proj.weight": 0},  # a shared expert behind a gate of its own
    "gpt_oss": {DOWN: 2, "experts.down_proj_bias": 1},  # transposed, with biases
    "jetmoe": {"output_linear.weight": 1, "bias": 0},  # one bias behind all experts
}


def tiny(family: str) -> PreTrainedModel:
    """A model with few and narrow experts, where the family's own defaults are many and wide."""
    own = {} if family in ("mixtral", "gpt_oss", "gemma2") else MOE
    return tiny_model(
        family, **own, **({"shared_expert_intermediate_size": 24} if family == "qwen2_moe" else {})
    )


def mixture(model: PreTrainedModel, layer: int = PLACE.before) -> Mixture:
    found = stream_writer(model, layer, batch_of())
    assert isinstance(found, Mixture)
    return found


def written(model: PreTrainedModel, found: Mixture, seed: int = 5) -> Tensor:
    """What a mixture gives on some rows, ``[N, H]``."""
    seen: list[Tensor] = []
    hook = found.watch(seen.append)
    streams.run(model, batch_of(seed=seed))
    hook.remove()
    return seen[0].detach().flatten(0, -2)


def random_map(size: int = 32) -> Tensor:
    return (
        torch.randn(size, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / size**0.5
    )


@pytest.mark.parametrize("family", MIXTURES)
def test_a_map_folded_into_the_experts_is_that_map_behind_them(family: str) -> None:
    model = tiny(family)
    found = mixture(model)
    assert found.weights == MIXTURES[family]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    z_NH, delta_HH = written(model, found), random_map()
    stream_NH = stream(model, PLACE.before + 1, batch_of(seed=5))
    found.add(delta_HH)
    wanted_NH = z_NH.double() @ (torch.eye(32, dtype=torch.float64) + delta_HH / found.scale)
    assert (
        (written(model, found) - wanted_NH).norm()
        < 1e-6 * wanted_NH.norm()
        < 1e-5 * (wanted_NH - z_NH).norm()
    )
    real_N = batch_of(seed=5)["attention_mask"].bool().flatten()
    moved_NH = stream(model, PLACE.before + 1, batch_of(seed=5)) - stream_NH
    torch.testing.assert_close(moved_NH, z_NH[real_N].double() @ delta_HH, rtol=1e-4, atol=1e-4)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    path = f"{decoder_layers(model)[0]}.{PLACE.before}.{found.name}"
    assert changed == {f"{path}.{name}" for name in found.weights}


@pytest.mark.parametrize("family", MIXTURES)
def test_the_map_that_changes_nothing_leaves_every_bit(family: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny(family).to(dtype)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        mixture(model).add(torch.zeros(32, 32, dtype=torch.float64))
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("family", MIXTURES)
def test_the_fold_finds_a_map_that_experts_can_hold(family: str) -> None:
    student = cut(tiny(family), MASK)
    other = copy.deepcopy(student)
    mixture(other).add(0.3 * random_map())
    with inputs(other, dict.fromkeys([PLACE.before + 1], "")) as seen:

        def target(batch: dict[str, Tensor], _: Tensor) -> Tensor:
            streams.run(other, batch)
            return seen[PLACE.before + 1]

        assert not torch.allclose(logits(student), logits(other), atol=1e-2)
        repair = fold(student, PLACE.before, [batch_of(24, seed) for seed in (1, 2)], target, ridge=0.0)
    assert repair.after < 1e-8 < 1e-4 < repair.before
    torch.testing.assert_close(logits(student), logits(other), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("goal", ["parent", "rotate", "diag"])
def test_the_error_of_the_stream_falls_to_what_is_told(family: str, goal: Any) -> None:
    parent, batch = tiny(family), batch_of(24)
    student = cut(parent, MASK)
    wanted_NH = stream(parent, PLACE.end, batch)
    if goal != "parent":
        repair_of_stream = StreamRepair(matrices(parent, [PLACE], [batch], goal)[0])
        wanted_NH = repair_of_stream(stream(student, PLACE.before + 1, batch))

    def error() -> float:
        left_NH = stream(student, PLACE.before + 1, batch) - wanted_NH
        return float((left_NH.square().sum(-1) / wanted_NH.square().sum(-1)).mean())

    def target(batch: dict[str, Tensor], h_BTH: Tensor) -> Tensor:
        if goal != "parent":
            return repair_of_stream(h_BTH)
        with inputs(parent, dict.fromkeys([PLACE.end], "")) as seen:
            streams.run(parent, batch)
            return seen[PLACE.end]

    before = error()
    repair = fold(student, PLACE.before, [batch], target, ridge=0.1)
    assert repair.before == pytest.approx(before, rel=1e-4)
    assert repair.after == pytest.approx(error(), rel=1e-4)
    assert repair.after < 0.99 * repair.before


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_a_student_that_misses_nothing_is_not_changed(family: str) -> None:
    """Its stream is the parent's already."""
    parent = tiny(family)
    student = copy.deepcopy(parent)
    with inputs(parent, dict.fromkeys([PLACE.before + 1], "")) as seen:

        def target(batch: dict[str, Tensor], _: Tensor) -> Tensor:
            streams.run(parent, batch)
            return seen[PLACE.before + 1]

        repair = fold(student, PLACE.before, [batch_of()], target, ridge=0.1)
    assert repair.before == repair.after == 0
    assert torch.equal(logits(student), logits(parent))


class Listed(nn.Module):
    """Experts as modules of their own, one for each token; ``extra`` of the input goes around them."""

    def __init__(self, extra: float = 0.0) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.SiLU(), nn.Linear(6, 6)) for _ in range(5)
        )
        self.extra = extra

    def forward(self, x_NH: Tensor, chosen: list[int]) -> Tensor:
        rows = [self.experts[expert](x) for expert, x in zip(chosen, x_NH, strict=True)]
        return torch.stack(rows) + self.extra * x_NH


def test_experts_that_no_token_chose_take_the_map_too() -> None:
    torch.manual_seed(0)
    module, x_NH = Listed(), torch.randn(8, 6)
    weights = last_weights(module, (x_NH, [1, 3] * 4), {}, set(), 1e-4)
    assert weights == {f"experts.{e}.2.{name}": 0 for e in range(5) for name in ("weight", "bias")}
    every, delta_HH = [0, 1, 2, 3, 4, 0, 2, 4], random_map(6)
    z_NH = module(x_NH, every).detach()
    Mixture("", module, 1.0, weights).add(delta_HH)
    wanted_NH = z_NH.double() @ (torch.eye(6, dtype=torch.float64) + delta_HH)
    torch.testing.assert_close(module(x_NH, every).double(), wanted_NH, rtol=1e-5, atol=1e-5)


def test_what_is_more_than_its_weights_write_takes_no_map() -> None:
    torch.manual_seed(0)
    assert last_weights(Listed(extra=0.5), (torch.randn(8, 6), [0, 1, 2, 3] * 2), {}, set(), 1e-4) == {}


@pytest.mark.parametrize(("family", "layer"), [("gemma2", 1), ("afmoe", 4)])
def test_experts_behind_a_norm_are_refused_by_name(family: str, layer: int) -> None:
    model = tiny(family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(
        ConfigError, match=rf"layer {layer} of this '{family}'.*layernorm \(\w+RMSNorm\), has no"
    ):
        stream_writer(model, layer, batch_of())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_experts_shared_with_another_layer_are_not_changed() -> None:
    model = tiny_model("mixtral")
    layers: Any = decoder_layers(model)[1]
    layers[2].mlp.experts.down_proj = layers[1].mlp.experts.down_proj
    with pytest.raises(ConfigError, match=r"layer 1 of this 'mixtral'.*mlp \(MixtralSparseMoeBlock\)"):
        stream_writer(model, 1, batch_of())
