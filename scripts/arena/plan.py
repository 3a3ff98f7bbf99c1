"""What is to be done: a list of runs, each a search, a recovery and a judgement."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

Gone = list[Any]
"""Removed units: layers by number, or halves by layer and kind, such as ``7a`` and ``9f``."""


@dataclass(frozen=True)
class Stage:
    """A command of ``src.cli``: config files, the later ones on top, and settings above them all."""

    configs: tuple[str, ...]
    settings: Mapping[str, Any]

    def on_top(self, overlays: Iterable[str], settings: Mapping[str, Any]) -> Stage:
        """The stage with further files and settings."""
        return Stage((*self.configs, *overlays), {**self.settings, **settings})

    @property
    def content(self) -> Any:
        """What the stage says, whatever its files are called and its comments say."""
        return [*(yaml.safe_load(Path(config).read_text()) for config in self.configs), dict(self.settings)]


@dataclass(frozen=True)
class Run:
    """One line of work: find a mask, recover it, judge it.

    Attributes:
        group: group of the plan.
        variant: name of the variant.
        title: its name in tables.
        ratio: share of the layers to remove.
        seed: seed of the recovery's order.
        search_seed: seed of the search.
        search: how the mask is found.
        recover: how the cut model is recovered, or None.
        removed: units that go, instead of a search.
        repair: keys of ``LinearPatch`` for a repair of the cut model, or None.
        kind: kind of the method, which its colour shows.
    """

    group: str
    variant: str
    title: str
    ratio: float
    seed: int
    search_seed: int
    search: Stage
    recover: Stage | None
    removed: tuple[Any, ...] | None = None
    repair: Mapping[str, Any] | None = None
    kind: str = ""

    def __str__(self) -> str:
        return f"{self.variant} {100 * self.ratio:g} % seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """All runs, and what they share.

    Attributes:
        name: of the results file, page and figures.
        teacher: directory of the model that is shortened.
        data: how many problems are ``train``, ``validation`` and ``test``, and the ``seed`` that draws them;
            or ``files``, for each of these the ``path`` of texts, how many ``rows`` and how many to ``skip``.
        cache: how the teacher's cache is written; None lets recoveries read the text beside a live teacher.
        references: for each group, the variant the others are compared with.
        runs: in the order of the file.
    """

    name: str
    teacher: str
    data: Mapping[str, Any]
    cache: Stage | None
    references: Mapping[str, str]
    runs: tuple[Run, ...]

    @property
    def names(self) -> dict[tuple[str, str], dict[str, str]]:
        """``title`` and ``kind`` of each variant, by its group and name."""
        return {(run.group, run.variant): {"title": run.title, "kind": run.kind} for run in self.runs}


def nested(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """``{"a.b": 1}`` as ``{"a": {"b": 1}}``."""
    return Namespace(dict(dotted)).as_dict()


def fingerprint(*content: Any) -> str:
    """Twelve hexadecimal digits that change with the content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
