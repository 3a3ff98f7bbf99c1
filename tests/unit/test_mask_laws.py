"""What a mask says of its units, against the definitions, for every legal mask of a small model."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from src.errors import ConfigError
from src.mask import Mask, Unit
from src.units.alternating import Alternating
from src.units.groups import InEach
from src.units.spaces import AnyOf

L, W = 4, 3


def every(unit: Unit) -> list[Mask]:
    """All legal masks of four layers."""
    made = list[Mask]()
    for keep in range(1, L + 1):
        spaces: dict[Unit, Any] = {"layer": AnyOf(L, keep), "half": Alternating(2 * L, 2 * keep)}
        made += [Mask("m", L, kept, "x", unit=unit) for kept in spaces[unit]]
    return made


def widths(unit: Unit) -> list[Mask]:
    """All masks of width that keep one or two of three units in each of four layers."""
    kept = [each for keep in (1, 2) for each in InEach(L, AnyOf(W, keep))]
    return [Mask("m", L, keep, "x", unit=unit, width=W) for keep in kept]


ALL = {"layer": every("layer"), "half": every("half"), "channel": widths("channel")}


def read_by(mask: Mask) -> list[tuple[str, int]]:
    """What runs in the cut model, in order: attention and feed-forward, by their layers in the parent."""
    if mask.unit == "half":
        return [(("attention", "feed_forward")[unit % 2], unit // 2) for unit in mask.keep]
    return [(kind, layer) for layer in mask.keep for kind in ("attention", "feed_forward")]


@pytest.mark.parametrize("unit", ALL)
def test_kept_and_removed_units_are_all_units_once(unit: str) -> None:
    for mask in ALL[unit]:
        assert sorted((*mask.keep, *mask.removed)) == list(range(mask.units))
        assert len(mask.attention) == len(mask.feed_forward) == mask.depth
        assert mask.recombines is (mask.attention != mask.feed_forward)


@pytest.mark.parametrize("unit", ["layer", "half"])
def test_the_two_kinds_are_what_runs_in_order(unit: str) -> None:
    for mask in ALL[unit]:
        ran = read_by(mask)
        assert mask.attention == tuple(layer for kind, layer in ran if kind == "attention")
        assert mask.feed_forward == tuple(layer for kind, layer in ran if kind == "feed_forward")
        assert [kind for kind, _ in ran] == ["attention", "feed_forward"] * mask.depth


@pytest.mark.parametrize("unit", ["layer", "half"])
def test_a_gap_is_where_something_is_missing_between_two_new_layers(unit: str) -> None:
    """By the units between the feed-forward of one new layer and the attention of the next."""
    for mask in ALL[unit]:
        gaps = list[int]()
        for at, (writer, reader) in enumerate(zip(mask.feed_forward, mask.attention[1:], strict=False)):
            between = [(kind, i) for i in range(L) for kind in ("attention", "feed_forward")]
            between = between[
                between.index(("feed_forward", writer)) + 1 : between.index(("attention", reader))
            ]
            gaps += [at] if between else []
        assert mask.gaps == tuple(gaps)
        assert mask.reads == (*mask.attention[1:], L)


def test_a_mask_of_width_has_every_layer_and_no_gap() -> None:
    for mask in ALL["channel"]:
        assert mask.attention == mask.feed_forward == tuple(range(L))
        assert (mask.depth, mask.gaps) == (L, ())
        assert [layer * W + unit for layer, kept in enumerate(mask.by_layer) for unit in kept] == [*mask.keep]
        assert len({len(kept) for kept in mask.by_layer}) == 1


@pytest.mark.parametrize("unit", ALL)
def test_a_file_holds_the_mask(unit: str, tmp_path: Path) -> None:
    for mask in ALL[unit][:: max(1, len(ALL[unit]) // 20)]:
        mask.save(tmp_path / "mask.json")
        assert Mask.load(tmp_path / "mask.json") == mask


@pytest.mark.parametrize("unit", ALL)
def test_words_tell_masks_apart_and_count(unit: str) -> None:
    words = {str(mask) for mask in ALL[unit]}
    if unit == "channel":  # too many to list: how many, of how many
        assert words == {f"keeps {count} of 3 channels of each layer" for count in (1, 2)}
        assert {mask.missing for mask in ALL[unit]} == {f"{n} of 3 channels of each layer" for n in (1, 2)}
        return
    assert len(words) == len(ALL[unit])
    for mask in ALL[unit]:
        strip = str(mask)[1 : 1 + L]
        assert [i for i, mark in enumerate(strip) if mark in "#a"] == [*mask.attention]
        assert [i for i, mark in enumerate(strip) if mark in "#f"] == [*mask.feed_forward]
        assert f"keeps {mask.depth} of {L}" in str(mask)
        assert mask.missing in str(mask)


def test_halves_of_whole_layers_say_what_the_mask_of_layers_says() -> None:
    for mask in ALL["layer"]:
        twice = tuple(unit for layer in mask.keep for unit in (2 * layer, 2 * layer + 1))
        halves = Mask("m", L, twice, "x", unit="half")
        assert (halves.attention, halves.gaps, halves.reads) == (mask.attention, mask.gaps, mask.reads)
        assert not halves.recombines
        assert halves.listed == mask.listed


def test_of_all_lists_those_are_refused_that_are_no_mask() -> None:
    """Every list of up to three units of four layers; of halves up to four of six."""
    legal = {mask.keep for mask in ALL["layer"]}
    for size in range(4):
        for keep in product(range(-1, L + 1), repeat=size):
            if keep in legal:
                Mask("m", L, keep, "x")
            else:
                with pytest.raises(ConfigError, match="keep must"):
                    Mask("m", L, keep, "x")
    pairs = {kept for keep in (1, 2, 3) for kept in Alternating(6, 2 * keep)}
    for size in (0, 1, 2, 3, 4):
        for keep in product(range(6), repeat=size):
            if keep not in pairs:
                with pytest.raises(ConfigError, match="mask: "):
                    Mask("m", 3, keep, "x", unit="half")


@pytest.mark.parametrize(
    ("keep", "width"),
    [
        ((0, 3, 6), 3),
        ((0, 3, 6, 9, 10), 3),
        ((3, 0, 6, 9), 3),
        ((0, 3, 6, 12), 3),
        ((), 3),
        ((0, 1, 2, 3), None),
    ],
)
def test_a_mask_of_width_is_as_wide_in_every_layer(keep: tuple[int, ...], width: int | None) -> None:
    with pytest.raises(ConfigError, match=r"mask: (keep must hold|width is None)"):
        Mask("m", L, keep, "x", unit="channel", width=width)


def test_a_mask_fits_models_of_its_depth_alone() -> None:
    mask = Mask.by_hand("m", L, (0, 2))
    mask.check(L, "other")
    with pytest.raises(ConfigError, match=r"made for a model of 4 layers \('m'\), but 'other' has 5"):
        mask.check(5, "other")
