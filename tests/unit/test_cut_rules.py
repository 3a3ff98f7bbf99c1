"""How a config follows its layers: each rule against the list of what every layer is, for every cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from src.models.cut_rules import (
    EXTRA_LAYERS,
    INDEX_LISTS,
    LAYER_COUNTS,
    NOT_PER_LAYER,
    OF_FEED_FORWARD,
    ONE_BASED_INDEX_LISTS,
    PREFIX_COUNTS,
    SUFFIX_COUNTS,
    slice_section,
    spell_out_periods,
)

L = 6
CUTS = [keep for size in range(1, L + 1) for keep in combinations(range(L), size)]
Reading = Callable[[dict[str, Any]], list[Any]]
"""What each layer is, read from a section as a family reads it."""


def depth(section: dict[str, Any]) -> range:
    return range(section["num_hidden_layers"])


READINGS: dict[str, tuple[list[Any], Reading]] = {
    "layer_types": (
        [["a", "b", "a", "c", "b", "b"]], lambda s: list(s["layer_types"]),
    ),
    **{name: ([[0, 3, 4], [5], [2]], lambda s, name=name: [i in s[name] for i in depth(s)])
       for name in INDEX_LISTS},
    **{name: ([[1, 4, 5], [6]], lambda s, name=name: [i + 1 in s[name] for i in depth(s)])
       for name in ONE_BASED_INDEX_LISTS},
    **{name: ([0, 1, 4, 6], lambda s, name=name: [i < s[name] for i in depth(s)])
       for name in PREFIX_COUNTS},
    **{name: ([0, 2, 6], lambda s, name=name: [i >= s["num_hidden_layers"] - s[name] for i in depth(s)])
       for name in SUFFIX_COUNTS},
    "per_layer_config": (
        [{"0": {"x": 1}, "4": {"x": 2}}], lambda s: [s["per_layer_config"].get(str(i)) for i in depth(s)],
    ),
    "hybrid_override_pattern": (["M*-ME*"], lambda s: list(s["hybrid_override_pattern"])),
}  # fmt: skip
"""By name: values in a parent of six layers, and how a family reads them."""


def readings() -> Iterator[tuple[str, Any, Reading]]:
    for name, (values, read) in READINGS.items():
        for value in values:
            yield name, value, read


@pytest.mark.parametrize(("name", "value", "read"), list(readings()))
def test_each_kept_layer_is_what_it_was(name: str, value: Any, read: Reading) -> None:
    section = {"num_hidden_layers": L, name: value}
    were = read(section)
    for keep in CUTS:
        cut = slice_section(section, L, keep)
        assert cut["num_hidden_layers"] == len(keep)
        assert read(cut) == [were[i] for i in keep], keep
    assert section == {"num_hidden_layers": L, name: value}, "the parent's is left alone"


@pytest.mark.parametrize(("name", "value", "read"), list(readings()))
def test_a_cut_of_a_cut_is_one_cut_and_no_cut_changes_nothing(name: str, value: Any, read: Reading) -> None:
    section = {"num_hidden_layers": L, name: value}
    assert slice_section(section, L, range(L)) == section
    for first in CUTS[::3]:
        once = slice_section(section, L, first)
        for second in combinations(range(len(first)), max(1, len(first) - 2)):
            whole = slice_section(section, L, [first[i] for i in second])
            assert slice_section(once, len(first), second) == whole


def test_a_list_as_long_as_the_model_belongs_to_its_layers_unless_it_is_known_not_to() -> None:
    unknown, shorter = list("uvwxyz"), [1, 2, 3]
    section = {"num_hidden_layers": L, "unheard_of": unknown, "short": shorter, "nested": {"table": unknown}}
    section |= dict.fromkeys(NOT_PER_LAYER, unknown)
    cut = slice_section(section, L, (0, 3))
    assert cut["unheard_of"] == ["u", "x"]
    assert all(cut[name] == unknown for name in NOT_PER_LAYER)
    assert (cut["short"], cut["nested"]) == (shorter, {"table": unknown})


def test_every_name_of_the_depth_follows_it_and_other_counts_stay() -> None:
    section = dict.fromkeys(LAYER_COUNTS, L) | {"num_attention_heads": L, "n_layer": 3}
    cut = slice_section(section, L, (1, 2))
    assert {cut[name] for name in LAYER_COUNTS if name != "n_layer"} == {2}
    assert (cut["n_layer"], cut["num_attention_heads"]) == (3, L), "of another length, or of something else"


def test_prediction_heads_are_counted_no_more() -> None:
    given = {"num_nextn_predict_layers": 1, "use_mtp": True, "mtp_layer_types": ["full"]}
    cut = slice_section({"num_hidden_layers": L, **given}, L, (0, 1))
    assert {name: cut[name] for name in given} == {name: EXTRA_LAYERS[name] for name in given}
    assert slice_section({"num_nextn_predict_layers": None}, L, (0,)) == {"num_nextn_predict_layers": None}


@pytest.mark.parametrize("step", [1, 2, 3, 4])
@pytest.mark.parametrize("dense", [None, [], [1], [0, 5]])
def test_a_period_is_what_it_says_layer_by_layer(step: int, dense: list[int] | None) -> None:
    """A layer has experts if it is not listed, and the step divides its number, counted from one."""
    section = {"num_hidden_layers": L, "decoder_sparse_step": step, "mlp_only_layers": dense}

    def experts(s: dict[str, Any]) -> list[bool]:
        listed = s["mlp_only_layers"] or []
        return [i not in listed and (i + 1) % s["decoder_sparse_step"] == 0 for i in depth(s)]

    were = experts(section)
    assert experts(spell_out_periods(section, L)) == were
    for keep in CUTS:
        assert experts(slice_section(section, L, keep)) == [were[i] for i in keep]


def test_block_types_repeat_to_the_end() -> None:
    section = {"num_hidden_layers": L, "block_types": ["r", "r", "a"]}
    assert slice_section(section, L, (1, 2, 5))["block_types"] == ["r", "a", "a"]


@pytest.mark.parametrize("scale", [1.4, 1.0, 0.1, 12.0])
def test_a_scale_over_the_root_of_the_depth_is_the_parents(scale: float) -> None:
    """To the last bit in float32, in which it multiplies; in float64 wherever some float reaches it."""
    for length in (L, 40, 62):
        wanted = scale / length**0.5
        for kept in range(1, length + 1):
            found = slice_section({"scale_depth": scale}, length, range(kept))["scale_depth"]
            assert np.float32(found / kept**0.5) == np.float32(wanted)
            near = np.float64(found) + np.spacing(found) * np.arange(-4, 5)
            assert found / kept**0.5 == wanted or wanted not in near / kept**0.5


def test_recombined_halves_take_each_setting_from_their_own_layers() -> None:
    section = {
        "num_hidden_layers": L,
        "layer_types": ["a", "b", "c", "d", "e", "f"],
        "mlp_layer_types": ["u", "v", "w", "x", "y", "z"],
        "mlp_only_layers": [2, 3],
        "full_attn_idxs": [2, 3],
    }
    for keep in combinations(range(L), 3):
        for feed_forward in combinations(range(L), 3):
            cut = slice_section(section, L, keep, feed_forward)
            one, other = (slice_section(section, L, each) for each in (keep, feed_forward))
            assert cut == {name: (other if name in OF_FEED_FORWARD else one)[name] for name in section}
            assert cut["layer_types"] == ["abcdef"[i] for i in keep]
            assert cut["mlp_layer_types"] == ["uvwxyz"[i] for i in feed_forward]
