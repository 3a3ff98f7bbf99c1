"""Settings of runs side by side: those that differ, by the keys of the command line."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from src.report.compare import differences
from src.report.run_files import flat

CALLBACK = "src.callbacks.HardenMask"

VALUES = st.sampled_from([None, True, False, 2, 3.5, "", "x", [], [2], [2, 3]])
SETTINGS = st.dictionaries(st.sampled_from("abcdef"), VALUES, max_size=6)


@given(st.lists(SETTINGS, min_size=2, max_size=4))
def test_the_settings_that_differ_are_those_and_with_their_own_values(settings: list[dict[str, Any]]) -> None:
    named = {str(number): own for number, own in enumerate(settings)}
    found = differences(named)
    for key in "abcdef":
        values = [repr(own.get(key, "missing here")) for own in settings]
        assert (key in found) == (len(set(values)) > 1)
        assert found.get(key, {}) == (
            {n: own[key] for n, own in named.items() if key in own} if key in found else {}
        )


def test_of_a_part_of_another_class_only_what_both_have_is_compared() -> None:
    first = {"a.class_path": "X", "a.init_args.seed": 1, "a.init_args.own": 2, "b": 3}
    second = {"a.class_path": "Y", "a.init_args.seed": 2, "a.init_args.other": 2, "b": 3}
    assert differences({"1": first, "2": second}) == {
        "a.class_path": {"1": "X", "2": "Y"}, "a.init_args.seed": {"1": 1, "2": 2}
    }  # fmt: skip
    assert differences({"1": first, "2": {"b": 3}}) == {"a.class_path": {"1": "X"}}


def test_keys_of_a_config_are_those_of_the_command_line_and_parts_of_lists_are_named_by_class() -> None:
    found = dict(
        flat(
            {"x": {"y": [1, 2], "z": {}}, "parts": [{"class_path": CALLBACK, "init_args": {"path": 1}}]}, "t"
        )
    )
    assert found == {
        "t.x.y": [1, 2], "t.x.z": {}, "t.parts.HardenMask.class_path": CALLBACK,
        "t.parts.HardenMask.init_args.path": 1,
    }  # fmt: skip


def test_no_part_of_a_list_hides_another() -> None:
    """Two callbacks of one class are told apart, and terms are named by the class that they hold."""
    terms = [{"term": {"class_path": "src.losses.Density", "init_args": {"eps": 1}}, "weight": 2}]
    twice = [{"class_path": CALLBACK, "init_args": {"path": path}} for path in (1, 2)]
    found = dict(flat({"parts": twice, "terms": terms}, "t"))
    assert found["t.parts.HardenMask.init_args.path"] == 1
    assert found["t.parts.HardenMask2.init_args.path"] == 2
    assert found["t.terms.Density.weight"] == 2
    assert found["t.terms.Density.term.init_args.eps"] == 1
