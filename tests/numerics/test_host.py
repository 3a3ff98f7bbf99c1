"""The parts of a host: each weight belongs to one, and exchanging it moves that part's weights alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from src.errors import ConfigError
from src.grow.host import OUTSIDE, Host
from src.mask import Mask, Unit
from src.models.cut import cut
from src.models.layers import decoder_layers
from tests.tiny import LAYERS, tiny_model

KEEP: dict[Unit, tuple[int, ...]] = {"layer": (0, 2, 3, 6), "half": (0, 1, 2, 5, 6, 7, 12, 13)}
CASES: list[tuple[str, Unit]] = [
    *((family, "layer") for family in ("gemma2", "mixtral", "opt", "bloom", "phi", "qwen3_moe", "lfm2")),
    *((family, "half") for family in ("gemma2", "mixtral", "opt", "olmo2")),
]
"""Two norms around a half; experts; biases; halves side by side; layers that differ; tied embeddings."""

Weights = dict[str, Tensor]


def weights(host: Host) -> Weights:
    return {name: tensor.clone() for name, tensor in host.model.state_dict().items()}


def moved(one: Weights, other: Weights) -> set[str]:
    return {name for name in one if not torch.equal(one[name], other[name])}


def made(family: str, unit: Unit) -> tuple[Host, Weights, Weights]:
    """A host, its parent's weights, and its own at first; every weight of the student is another."""
    parent, mask = tiny_model(family), Mask("m", LAYERS, KEEP[unit], "test", unit=unit)
    whole, student = {k: v.clone() for k, v in parent.state_dict().items()}, cut(parent, mask)
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(1.0)
    host = Host(parent, student, mask)
    return host, whole, weights(host)


@pytest.mark.parametrize(("family", "unit"), CASES)
def test_each_recovered_weight_belongs_to_one_part(family: str, unit: Unit) -> None:
    host, whole, recovered = made(family, unit)
    assert host.parts == {OUTSIDE, *KEEP[unit]}
    path, seen = decoder_layers(host.model)[0], dict[str, int]()
    for part in sorted(host.parts):
        host.exchange([part])
        now = weights(host)
        changed = moved(recovered, now)
        assert changed, f"part {part} holds weights"
        assert not changed & seen.keys(), "no weight is of two parts"
        assert not moved({k: whole[k] for k in changed}, now), "they are the parent's again"
        seen |= dict.fromkeys(changed, part)
        host.exchange([part])
        assert not moved(recovered, weights(host)), "twice is never"
        inside = {name for name in changed if name.startswith(f"{path}.")}
        layers = {int(name.removeprefix(f"{path}.").partition(".")[0]) for name in inside}
        assert layers == (set() if part == OUTSIDE else {part // (2 if unit == "half" else 1)})
        assert part != OUTSIDE or not inside
    assert seen.keys() == moved(whole, recovered), "and all of them are of some"


@pytest.mark.parametrize(("family", "unit"), [("llama", "layer"), ("mixtral", "half")])
def test_the_order_of_exchanges_does_not_matter(family: str, unit: Unit) -> None:
    host, _, recovered = made(family, unit)
    ends = list[Weights]()
    for order in itertools.permutations(sorted(host.parts)[:3]):
        for part in order:
            host.exchange([part])
        ends.append(weights(host))
        host.exchange(order)
        assert not moved(recovered, weights(host))
    assert all(not moved(ends[0], other) for other in ends)


def test_a_removed_unit_has_the_parents_weights_throughout() -> None:
    _, whole, recovered = made("llama", "layer")
    removed = [f"model.layers.{layer}." for layer in range(LAYERS) if layer not in KEEP["layer"]]
    own = {name for name in whole if any(name.startswith(start) for start in removed)}
    assert own
    assert not own & moved(whole, recovered)


def test_the_student_keeps_what_the_parent_gives_up() -> None:
    """Its tensors take turns with the host's: no third copy of the weights is made."""
    parent, mask = tiny_model("llama"), Mask("m", LAYERS, KEEP["layer"], "test")
    student = cut(parent, mask)
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(1.0)
    trained = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    host, given_up = Host(parent, student, mask), cut(tiny_model("llama"), mask).state_dict()
    assert all(torch.equal(tensor, given_up[name]) for name, tensor in student.state_dict().items())
    host.exchange(host.parts)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in student.state_dict().items())


@pytest.mark.parametrize("keep", [(0, 1, 2), (0, 2, 3, 5, 6)])
def test_a_cut_of_another_mask_or_model_is_no_guest(keep: tuple[int, ...]) -> None:
    parent, mask = tiny_model("llama"), Mask("m", LAYERS, keep, "test")
    other = cut(tiny_model("llama", intermediate_size=40), mask)
    with pytest.raises(
        ConfigError, match=r"--model: its tensor 'model\.layers\.0\..* is none of the parent's"
    ):
        Host(parent, other, mask)
    more = cut(parent, Mask("m", LAYERS, (*keep, 6) if 6 not in keep else (0, 1, *keep[1:]), "test"))
    with pytest.raises(ConfigError, match="none of the parent's"):
        Host(parent, more, mask)
