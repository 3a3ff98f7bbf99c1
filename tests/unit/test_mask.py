"""The mask file: round trip, refusals, nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from src.errors import ConfigError
from src.files import write_json
from src.mask import Mask


def test_round_trip_and_complement(tmp_path: Path) -> None:
    mask = Mask(
        model="m", num_layers=5, keep=(0, 2, 4), method="x", seed=0, tokens_seen=7, metrics={"kl": 0.5}
    )
    mask.save(tmp_path / "deep" / "mask.json")
    assert Mask.load(tmp_path / "deep" / "mask.json") == mask
    assert mask.removed == (1, 3)
    assert sorted(mask.keep + mask.removed) == list(range(5))
    assert "[#.#.#]" in str(mask)


@pytest.mark.parametrize("keep", [(), (1, 0), (0, 0), (-1, 2), (0, 5)])
def test_impossible_layers_are_refused(keep: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="keep"):
        Mask(model="m", num_layers=5, keep=keep, method="x")


@pytest.mark.parametrize(
    ("change", "told"),
    [({"kep": [0]}, "Did you mean 'keep'"), ({"keep": None}, "lacks"), ({"method": None}, "method")],
)
def test_faulty_files_are_refused(tmp_path: Path, change: dict[str, object], told: str) -> None:
    raw = {"model": "m", "num_layers": 3, "keep": [0], "method": "x"} | change
    path = tmp_path / "mask.json"
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
    with pytest.raises(ConfigError, match=told):
        Mask.load(path)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"keep": keep} for keep in (["0", 1], [0.0, 1.0], [False, True], "01", 3)),
        *({"num_layers": number} for number in ("3", True, 3.0)),
        *({"model": 3}, {"metrics": [1]}, {"metrics": {"kl": "low"}}, {"tokens_seen": "many"}, {"seed": [1]}),
    ],
)
def test_a_field_of_another_kind_is_named(tmp_path: Path, wrong: dict[str, object]) -> None:
    path, (field,) = tmp_path / "mask.json", wrong
    path.write_text(json.dumps({"model": "m", "num_layers": 3, "keep": [0], "method": "x"} | wrong))
    with pytest.raises(ConfigError, match=f"{field} must be .*, found"):
        Mask.load(path)
    path.write_text("[1]")
    with pytest.raises(ConfigError, match="holds a list"):
        Mask.load(path)


def test_a_mask_of_another_depth_is_refused() -> None:
    mask = Mask(model="m", num_layers=5, keep=(0,), method="x")
    mask.check(5, "m")
    with pytest.raises(ConfigError, match=r"5 layers.*has 6"):
        mask.check(6, "other")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
