"""A plan, from YAML: groups of named variants x ratios x seeds.

A variant inherits the keys of its group, and both those of :class:`Variant`::

    groups:
      methods:
        reference: ours                     # what the others are compared with
        variants:
          ours: {}
          tail: {title: last layers, overlays: [configs/policy/tail.yaml], search_once: true}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from os.path import expandvars
from pathlib import Path
from typing import Any

import yaml

from scripts.arena.plan import Plan, Run, Stage
from src.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Variant:
    """Keys of a variant, or of a group for all its variants.

    Attributes:
        title: name in tables.
        kind: ``learned``, ``searched``, ``scored`` or ``fixed``: the colour in figures.
        overlays: config files on top of the search's.
        search: dotted keys of the search, above the overlays.
        by_ratio: the same for one share of the layers alone.
        recover: dotted keys of the recovery; False leaves the cut model as it is.
        removed: the layers, or halves such as ``7a`` and ``9f``, that go, instead of a search.
        repair: keys of ``src.repair.linear_patch.LinearPatch``: the cut models are repaired on the
            validation problems before they are judged or recovered.
        search_once: the mask does not depend on the seed, or one mask is wanted: search with the first seed.
        ratios: shares of the layers to remove, each with its seeds, instead of the plan's.
    """

    title: str = ""
    kind: str = ""
    overlays: tuple[str, ...] = ()
    search: Mapping[str, Any] | None = None
    by_ratio: Mapping[float, Mapping[str, Any]] | None = None
    recover: Mapping[str, Any] | bool = True
    removed: tuple[Any, ...] | None = None
    repair: Mapping[str, Any] | None = None
    search_once: bool = False
    ratios: Mapping[float, list[int]] | None = None


def read(path: str | Path) -> Plan:
    """Read and expand a plan, and the variables of the environment in it.

    Raises:
        ConfigError: an unknown or missing key, a missing file, or a reference that is no variant.
    """
    raw = yaml.safe_load(expandvars(Path(path).read_text()))
    _check(raw, ("name", "teacher", "data", "cache", "search", "recover", "ratios", "groups"), str(path))
    search, recover = (_stage(raw[key], f"{path}: {key}") for key in ("search", "recover"))
    cache = raw["cache"] and _stage(raw["cache"], f"{path}: cache")
    runs, references = list[Run](), {}
    for group, keys in raw["groups"].items():
        references[group] = keys["reference"]
        variants = keys["variants"]
        if keys["reference"] not in variants:
            hint = did_you_mean(keys["reference"], variants)
            raise ConfigError(f"{path}: {group}.reference: '{keys['reference']}' is no variant.{hint}")
        shared = {key: value for key, value in keys.items() if key not in ("reference", "variants")}
        for name, own in variants.items():
            where = f"{path}: {group}.{name}"
            told = _variant(shared, own or {}, where)
            find = search.on_top(_files(told.overlays, where), told.search or {})
            again = told.recover if isinstance(told.recover, Mapping) else {}
            heal = None if told.recover is False else recover.on_top((), again)
            for ratio, seeds in (told.ratios or raw["ratios"]).items():
                here = find.on_top((), (told.by_ratio or {}).get(ratio, {}))
                for seed in seeds:
                    first = seeds[0] if told.search_once else seed
                    about = (group, name, told.title or name, ratio, seed, first, here, heal)
                    runs.append(Run(*about, told.removed, told.repair, told.kind))
    return Plan(raw["name"], raw["teacher"], raw["data"], cache, references, tuple(runs))


def _variant(shared: dict[str, Any], own: dict[str, Any], where: str) -> Variant:
    known = [field.name for field in fields(Variant)]
    for key in {**shared, **own}:
        if key not in known:
            raise ConfigError(f"{where}: unknown key '{key}'.{did_you_mean(key, known)}")
    merged = {**shared, **own}
    for key in ("search", "recover"):
        if isinstance(shared.get(key), Mapping) and isinstance(own.get(key), Mapping):
            merged[key] = {**shared[key], **own[key]}
    return Variant(**merged)


def _stage(raw: dict[str, Any], where: str) -> Stage:
    return Stage(_files(raw["configs"], where), raw.get("set", {}))


def _files(names: Iterable[str], where: str) -> tuple[str, ...]:
    missing = [name for name in names if not Path(name).is_file()]
    if missing:
        raise ConfigError(f"{where}: there is no {', '.join(missing)}. Name files of configs/.")
    return tuple(names)


def _check(raw: Any, wanted: tuple[str, ...], where: str) -> None:
    found = raw.keys() if isinstance(raw, dict) else set()
    if found != set(wanted):
        lacks, extra = sorted(set(wanted) - found), sorted(found - set(wanted))
        raise ConfigError(f"{where}: lacks {lacks}, does not know {extra}. Accepted: {', '.join(wanted)}.")
