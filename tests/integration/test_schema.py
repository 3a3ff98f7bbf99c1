"""The schema for editors: it accepts what is shipped, and no key that is misspelt, wherever it stands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from src import schema
from src.losses.distill import Distillation
from src.policies.base import MaskPolicy
from src.schema import Schema, fitting, loosened
from src.teachers import CachedTeacher, LiveTeacher, TeacherSource
from tests.integration.test_configs import EXPERIMENTS
from tests.integration.test_overlays import OVERLAYS

OTHERS = ("arena", "sweep", "tasks", "plan_accuracy.yaml")
"""Files under configs/ that are not settings of ``fit``."""
FILES = [path for path in sorted(Path("configs").rglob("*.yaml")) if path.parts[1] not in OTHERS]


def test_the_files_are_those_of_fit() -> None:
    assert {*EXPERIMENTS, *OVERLAYS} < {*FILES}
    assert all({"model", "data", "trainer"} & yaml.safe_load(file.read_text()).keys() for file in FILES)


def test_a_class_fits_by_descent_or_by_what_it_can() -> None:
    assert {"src.policies.GumbelTopK", "src.policies.SLEB"} < fitting(MaskPolicy).keys()
    assert all(issubclass(kind, MaskPolicy) for kind in fitting(MaskPolicy).values())
    assert {LiveTeacher, CachedTeacher} <= {*fitting(TeacherSource).values()}, "a protocol has no descendants"
    assert TeacherSource not in fitting(TeacherSource).values()
    assert fitting(Distillation) == {"src.losses.Distillation": Distillation}


def test_loosened_requires_nothing_appends_to_lists_and_knows_both_paths() -> None:
    listed = {"type": ["array", "null"], "items": {"type": "integer"}}
    strict = {
        "type": "object",
        "required": ["class_path"],
        "additionalProperties": False,
        "properties": {
            "$schema": {"type": "string"},
            "class_path": {"const": "src.losses.Distillation"},
            "required": {"anyOf": [{"type": "null"}, listed], "default": {"required": 1}},
            "properties": {"type": "object", "properties": {"a": listed}, "required": ["a"]},
        },
    }
    found = loosened(strict)
    assert "required" not in found
    assert found["properties"] == {
        "class_path": {"enum": ["src.losses.Distillation", "src.losses.distill.Distillation"]},
        "required": strict["properties"]["required"],
        "required+": strict["properties"]["required"],
        "properties": {"type": "object", "properties": {"a": listed, "a+": listed}},
    }


def keys(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every key within settings."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in pairs:
        if isinstance(value, dict):
            yield (*path, key)
        yield from keys(part, (*path, key))


def misspelt(settings: Any, path: tuple[Any, ...]) -> Any:
    """Settings with an ``x`` behind one key."""
    changed = deepcopy(settings)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[f"{path[-1]}x"] = place.pop(path[-1])
    return changed


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Schema:
    """What the command writes."""
    out = tmp_path_factory.mktemp("schema") / "schema.json"
    schema.main(["--out", str(out)])
    found: Schema = json.loads(out.read_text())
    return found


@pytest.mark.slow
def test_every_shipped_file_is_valid_and_no_misspelt_key_is(written: Schema) -> None:
    """Keys of free mappings aside: the settings of an architecture are transformers'."""
    jsonschema = pytest.importorskip("jsonschema", reason="needs the extra dev")
    kind = jsonschema.Draft202012Validator
    kind.check_schema(written)
    valid, tried = kind(written).is_valid, 0
    for file in FILES:
        settings = yaml.safe_load(file.read_text())
        assert valid(settings), file
        for path in keys(settings):
            if "architecture" not in path[:-1]:
                assert not valid(misspelt(settings, path)), (file, path)
                tried += 1
    assert tried > 500
    for wrong in (
        {"trainer": {"max_steps": "many"}},
        {"model": {"class_path": "src.search.MaskSearhc", "init_args": {}}},
    ):
        assert not valid(wrong)


@pytest.mark.slow
def test_it_is_small_and_describes_its_keys(written: Schema) -> None:
    assert len(json.dumps(written)) < 500_000, "of all classes that are imported it would be megabytes"
    search = next(
        form["properties"]["init_args"]["properties"]
        for form in written["$defs"]["LightningModule"]["anyOf"]
        if form.get("properties", {}).get("class_path", {}).get("enum") == ["src.search.MaskSearch"]
    )
    assert search["draws"]["default"] == 4
    assert search["unit"]["enum"] == ["layer", "half", "kv_group", "channel"]
    assert "removed" in search["unit"]["description"]
