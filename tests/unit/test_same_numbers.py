"""The comparison of two commits finds one bit, and takes a field that one side lacks for no difference."""

import torch

from scripts.lab.same_numbers import compare, digests, leaves


def test_one_bit_of_one_weight_is_found():
    weights = {"a": torch.linspace(0, 1, 7), "b": torch.ones(2, 3)}
    other = {name: tensor.clone() for name, tensor in weights.items()}
    assert compare({"weights": digests(weights)}, {"weights": digests(other)})[1] == 0
    other["a"].view(torch.int32)[3] ^= 1
    assert compare({"weights": digests(weights)}, {"weights": digests(other)})[1] == 1


def test_a_weight_of_another_shape_or_on_one_side_only_is_found():
    weights = digests({"a": torch.ones(2, 3)})
    assert compare({"weights": weights}, {"weights": digests({"a": torch.ones(3, 2)})})[1] == 1
    assert compare({"weights": weights}, {"weights": weights | digests({"b": torch.ones(1)})})[1] == 1
    assert compare({"weights": weights}, {})[1] == 1


def test_of_json_the_shared_numbers_count_and_not_where_they_were_made():
    old = {"keep": [0, 2], "git_sha": "aaa", "metrics": {"kl": 0.1}}
    new = {"keep": [0, 2], "git_sha": "bbb", "metrics": {"kl": 0.1, "kl_adapted": 0.05}}
    assert compare({"mask.json": leaves(old)}, {"mask.json": leaves(new)})[1] == 0
    new["metrics"]["kl"] = 0.1 + 2**-56
    assert compare({"mask.json": leaves(old)}, {"mask.json": leaves(new)})[1] == 1
    assert compare({"mask.json": leaves(old)}, {"mask.json": leaves({"other": 1})})[1] == 1
