"""Laws of the local error: whose gradient it is, what trains, what is neither computed nor kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from src.data.batches import Batch, Supervised
from src.errors import ConfigError
from src.losses import CrossEntropy, Distillation, HiddenStates, Weighted
from src.losses.objective import Objective
from src.mask import Mask
from src.models.streams import streams
from src.recover import Recovery
from tests.numerics.test_terms import close, graded, recovery, rows  # noqa: F401
from tests.planning import LAYER, RECOVER, planner_of

KEPT = (0, 2, 3, 5)
"""Of the tiny model's six layers; the gaps lie behind the first and the third."""


def local(layers: Any = "all", **keys: Any) -> dict[str, Any]:
    """Settings of a recovery by local errors."""
    return {"terms": [Weighted(HiddenStates(layers, local=True))], "distillation": None, **keys}


def local_recovery(mask: str, layers: Any = "all", **keys: Any) -> Recovery:
    return recovery(mask, *local(layers)["terms"], **keys)


SETTINGS = yaml.safe_load(Path("configs/recover/local.yaml").read_text())["model"]["init_args"]
"""Of the overlay."""


def own(grads: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    return {name: grad for name, grad in grads.items() if f".layers.{layer}." in name}


def trained(made: Recovery) -> set[str]:
    return {name for name, p in made.named_parameters() if p.requires_grad}


def layers_of(names: set[str]) -> set[int]:
    return {int(name.partition(".layers.")[2].split(".")[0]) for name in names}


@pytest.mark.parametrize("again", [False, True])
def test_each_layer_has_the_gradient_of_its_own_error_alone(again: bool, mask_file: str, rows: Batch) -> None:  # noqa: F811
    """The sum of the errors is that of the term; recomputed layers too are given their input without one."""
    value, grads = graded(local_recovery(mask_file, checkpoint_activations=again), rows)
    made = recovery(mask_file, Weighted(HiddenStates()))
    whole = graded(made, rows)
    assert value == whole[0]
    for position, layer in enumerate(KEPT):
        made.objective = Objective(None, [Weighted(HiddenStates([layer]))])
        alone = graded(made, rows)[1]
        close((value, own(grads, position)), (value, own(alone, position)))
        assert own(grads, position)
    first = own(grads, 0), own(whole[1], 0)
    assert any(not torch.allclose(x, first[1][name], rtol=1e-2) for name, x in first[0].items())


@pytest.mark.parametrize(
    ("layers", "scope", "moving"),
    [
        ("all", "full", {0, 1, 2, 3}),
        ("gaps", "full", {0, 2}),
        ([3], "full", {2}),
        ([2, 3], "cut_adjacent", {1, 2}),
        pytest.param("gaps", "lora", {0, 2}, marks=pytest.mark.slow),
    ],
)
def test_what_trains_is_what_is_compared_as_far_as_the_scope_goes(
    layers: Any,
    scope: Any,
    moving: set[int],
    mask_file: str,
    rows: Batch,  # noqa: F811
) -> None:
    """And all of it: a weight that trains without a gradient would stop several ranks."""
    made = local_recovery(mask_file, layers, scope=scope)
    _, grads = graded(made, rows)
    assert layers_of(trained(made)) == moving
    assert set(grads) == trained(made)
    assert all(bool(grad.any()) for name, grad in grads.items() if "lora_A" not in name)


def test_only_the_layers_around_a_cut_are_adjacent(tmp_path: Path, teacher_dir: str, rows: Batch) -> None:  # noqa: F811
    path = str(tmp_path / "mask.json")
    Mask(teacher_dir, 6, (0, 1, 2, 4, 5), "test").save(path)
    made = local_recovery(path, scope="cut_adjacent")
    _, grads = graded(made, rows)
    assert layers_of(set(grads)) == {2, 3}


@contextmanager
def counted(made: Recovery) -> Iterator[dict[str, int]]:
    """Counts positions that pass through the heads, and bytes that are kept for the backward pass."""
    found = {"positions": 0, "bytes": 0}

    def head(_: Any, given: tuple[Tensor], __: Any) -> None:
        found["positions"] += given[0].shape[:-1].numel()

    weights = {p.untyped_storage().data_ptr() for p in made.model.parameters()}

    def keep(x: Tensor) -> Tensor:
        found["bytes"] += x.nbytes * (x.untyped_storage().data_ptr() not in weights)
        return x

    heads = {id(h.linear): h.linear for h in (made.head, made.teacher.head)}  # type: ignore[attr-defined]
    hooks = [linear.register_forward_hook(head) for linear in heads.values()]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        yield found
    for hook in hooks:
        hook.remove()


def test_no_position_has_logits_and_frozen_layers_keep_nothing(
    tmp_path: Path,
    teacher_dir: str,
    rows: Batch,  # noqa: F811
) -> None:
    """One layer of five trains: it keeps what one layer of the whole model keeps."""
    path, kept = str(tmp_path / "mask.json"), list[int]()
    Mask(teacher_dir, 6, (0, 1, 2, 4, 5), "test").save(path)
    for made in (local_recovery(path, [2]), local_recovery(path), recovery(path, Weighted(HiddenStates()))):
        with counted(made) as found:
            made.losses(Supervised.of(rows))
        kept.append(found["bytes"])
        assert (found["positions"] == 0) == made.objective.local
    one, five, whole = kept
    assert 4 * one < five <= 6 * one
    assert five <= whole


def test_validation_judges_the_whole_model(mask_file: str, rows: Batch) -> None:  # noqa: F811
    """By the divergence of its logits, as in every recovery."""
    both = local_recovery(mask_file), recovery(mask_file)
    judged = [made.distillation.measured(made.step(Supervised.of(rows))) for made in both]
    assert torch.equal(*judged)
    assert judged[0] > 0


def test_a_stream_apart_is_the_same_stream(mask_file: str, rows: Batch) -> None:  # noqa: F811
    made = local_recovery(mask_file)
    outputs = []
    for apart in (False, True):
        with streams(made.model, range(4), apart=apart) as collected:
            last = made.head.hidden(rows)
        outputs.append([*collected.values(), last])
        assert last.requires_grad is not apart
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


REFUSED = {
    "beside": ({"distillation": Distillation()}, "Distillation and HiddenStates cannot be one loss"),
    "more": (
        {"terms": [*local()["terms"], Weighted(CrossEntropy())]},
        "HiddenStates and CrossEntropy cannot be one loss",
    ),
    "scope": ({**local([0]), "scope": "cut_adjacent"}, "trains none of the layers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_train_is_refused(case: str, tmp_path: Path, teacher_dir: str) -> None:
    path = str(tmp_path / "mask.json")
    Mask(teacher_dir, 6, (0, 1, 2, 4, 5), "test").save(path)
    keys, told = REFUSED[case]
    with pytest.raises(ConfigError, match=told):
        Recovery(path, **{**local(), **keys})


@pytest.mark.slow
def test_a_plan_sees_no_logits_and_only_the_layers_that_train(tmp_path: Path) -> None:
    """One of four layers is removed; two of the others lie around the gap, and are all that is trained.

    The optimiser holds two moments of each weight, and a count of steps for each of a layer's eleven tensors.
    """
    keys = {f"model.init_args.{key}": "null" if value is None else value for key, value in SETTINGS.items()}
    whole, near = (planner_of(tmp_path, RECOVER, **more).trace() for more in ({}, keys))
    assert near.trainable == 2 * LAYER < whole.trainable
    assert near.peak["loss chunk"] == 0 < whole.peak["loss chunk"]
    assert near.peak["activations"] < whole.peak["activations"]
    assert near.peak["optimiser"] == 2 * (2 * 4 * LAYER + 4 * 11)
    assert near.flops < whole.flops
