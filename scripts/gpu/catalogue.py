"""The parts: what each shows, which module shows it, and which packages it needs. No import of torch here."""

from __future__ import annotations

import importlib.util
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from src.errors import ConfigError, did_you_mean

LIMIT = 470
"""Seconds a part may take before it is stopped and says so."""

CORE = ("torch", "transformers", "safetensors", "rich")
STAGES = (*CORE, "lightning", "jsonargparse", "datasets", "tensorboard", "pyarrow", "accelerate", "yaml")

SHAPES = ("0.6b", "8b")
VARIANTS = ("single", "fsdp", "fsdp2", "deepspeed_z2", "deepspeed_z3", "int8", "nf4")
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Part:
    """One measurement, run in a process of its own.

    Attributes:
        name: what selects it, and its section in the results.
        what: what it shows.
        module: module under ``scripts.gpu`` that runs it.
        needs: packages it imports.
    """

    name: str
    what: str
    module: str
    needs: tuple[str, ...] = CORE


PARTS = (
    Part("laws", "open gates = teacher, hard gates = cut, in bf16", "laws"),
    Part("search_step", "the search step against the naive one", "search_step"),
    Part("loss", "chunked loss against whole at 152 k classes", "loss"),
    Part("speed", "prefill and decode of 36 -> 27 layers against the ideal", "speed"),
    *(
        Part(f"stages/{shape}/{variant}", "search, cache and recovery, a minute each", "stages", STAGES)
        for shape in SHAPES
        for variant in VARIANTS
    ),
    Part("planner", "measured peaks of the stages against `plan`", "planner", STAGES),
    Part("headline/teacher", "a 32-layer teacher trained on the demo's task", "headline", STAGES),
    *(
        Part(f"headline/seed{s}", "its 24 best layers at 2 % of its tokens", "headline", STAGES)
        for s in SEEDS
    ),
)


def chosen(asked: Sequence[str]) -> list[Part]:
    """The parts asked for, by name or by the beginning of it; all where nothing is asked.

    Raises:
        ConfigError: there is no such part.
    """
    found = []
    for word in asked or [""]:
        word = word.rstrip("/")
        hits = [p for p in PARTS if not word or p.name == word or p.name.startswith(f"{word}/")]
        if not hits:
            names = [p.name for p in PARTS] + ["stages", "headline", *(f"stages/{s}" for s in SHAPES)]
            raise ConfigError(f"part: there is no '{word}'.{did_you_mean(word, names)} --list shows all.")
        found += [p for p in hits if p not in found]
    return found


def outside(pyproject: Path) -> list[str]:
    """What of the project's dependencies is installed in a version that it was not tested with."""
    from packaging.requirements import Requirement  # comes with transformers

    wanted = [Requirement(line) for line in tomllib.loads(pyproject.read_text())["project"]["dependencies"]]
    found = {need.name: metadata.version(need.name) for need in wanted if not missing([need.name])}
    return [
        f"{need.name} {found[need.name]} ({need.specifier} asked)"
        for need in wanted
        if need.name in found and not need.specifier.contains(found[need.name], prereleases=True)
    ]


def missing(packages: Iterable[str]) -> list[str]:
    """Those of ``packages`` that this Python does not have."""
    return [name for name in packages if importlib.util.find_spec(name) is None]
