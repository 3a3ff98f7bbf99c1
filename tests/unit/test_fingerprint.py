"""The fingerprint of a model's stored weights: the same for the same weights, another one for others."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from src.models.fingerprint import SCHEME, differ, weights_fingerprint
from tests.tiny import tiny_model

FOUR = {"num_hidden_layers": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama", **FOUR).save_pretrained(path)
    return str(path)


def test_it_is_that_of_a_copy_and_of_other_shards(model: str, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "copy")
    loaded = AutoModelForCausalLM.from_pretrained(model)
    loaded.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    found = {weights_fingerprint(str(path)) for path in (model, tmp_path / "copy", tmp_path / "shards")}
    assert len(found) == 1
    assert str(found.pop()).startswith(SCHEME)


def first(weight: Tensor) -> None:
    weight.view(-1)[0] += 1


def last(weight: Tensor) -> None:
    weight.view(-1)[-1] += 1


def little(weight: Tensor) -> None:
    weight.mul_(1 + 1e-6)


def half(weight: Tensor) -> None:
    weight.copy_(weight.bfloat16().float())


@pytest.mark.parametrize("change", [first, last, little, half])
@pytest.mark.parametrize(
    "name", ["model.layers.3.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"]
)
def test_it_is_another_one_if_any_tensor_was_trained(
    model: str, tmp_path: Path, name: str, change: Callable[[Tensor], None]
) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        change(dict(loaded.named_parameters())[name])
    loaded.save_pretrained(tmp_path)
    assert differ(weights_fingerprint(model), weights_fingerprint(str(tmp_path)))


def test_it_is_another_one_for_another_type_or_shape(model: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    tiny_model("llama", num_hidden_layers=3).save_pretrained(tmp_path / "short")
    tiny_model("llama", seed=1, **FOUR).save_pretrained(tmp_path / "seed")
    found = {weights_fingerprint(str(path)) for path in (model, *tmp_path.iterdir())}
    assert len(found) == 4


def test_pickled_weights_have_one_too(model: str, tmp_path: Path) -> None:
    state = AutoModelForCausalLM.from_pretrained(model).state_dict()
    for copy in ("one", "two", "other"):
        (tmp_path / copy).mkdir()
        if copy == "other":
            state["model.norm.weight"] = state["model.norm.weight"] + 1
        torch.save(state, tmp_path / copy / "pytorch_model.bin")
    one, two, other = (weights_fingerprint(str(tmp_path / copy)) for copy in ("one", "two", "other"))
    assert differ(one, two) is False
    assert differ(one, other) is True


def test_it_is_none_where_it_cannot_be_known(tmp_path: Path) -> None:
    assert weights_fingerprint(str(tmp_path)) is None
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    assert weights_fingerprint(str(tmp_path)) is None
    assert weights_fingerprint("someone/never-downloaded") is None
    assert differ(None, "w1-00") is None
    assert differ("0123456789abcdef", "w1-00") is None
