"""Read what any run has left, finished or not, whole or a single stage of one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from src.data.distinct import Distinct
from src.errors import ConfigError
from src.evaluate.intervals import Array
from src.mask import Mask
from src.report.run import STAGES, Record, read_record, read_rows
from src.report.verb import judged, models_of
from src.training.identity import RECOVERS
from src.training.settings_file import read_settings

PARTS = ("seed_everything", "model", "data", "trainer", "threads")
"""Parts of a run's config that say what it does."""
_ELSEWHERE = "trainer.logger"
_OF_A_STAGE = ("config.yaml", "record.json", "mask.json")


@dataclass(frozen=True)
class RunFiles:
    """Holds what a run has left; what is absent is empty.

    Attributes:
        name: the run's name beside others.
        mask: the mask that it learned, or that it recovers.
        settings: values by key; the key begins with the stage.
        records: content of ``record.json`` of each stage, by the stage's name.
        rows: of each stage, hash and number of tokens of each row that it has read.
        evaluate, tasks, benchmark: content of the files of these names.
    """

    name: str
    mask: Mask | None
    settings: dict[str, Any]
    records: dict[str, Record]
    rows: dict[str, Tensor]
    evaluate: Record
    tasks: Record
    benchmark: Record

    @classmethod
    def read(cls, name: str, directory: Path) -> RunFiles:
        """Read the files of a run: its stages in ``search`` and ``recover``, or one in the directory itself.

        Raises:
            ConfigError: there are none, or one of them cannot be read.
        """
        stages = {stage: directory / stage for stage in STAGES if _is_stage(directory / stage)}
        stages = stages or ({"": directory} if _is_stage(directory) else {})
        evaluate, tasks, benchmark = (
            read_record(directory / f"{file}.json") for file in ("evaluate", "tasks", "benchmark")
        )
        if not (stages or evaluate):
            raise ConfigError(
                f"compare: '{directory}' is no run: neither it nor its search or recover holds any of "
                f"{', '.join(_OF_A_STAGE)}; nor is there an evaluate.json."
            )
        configs = {
            stage: read_settings(str(place / "config.yaml"), "compare")
            for stage, place in stages.items()
            if (place / "config.yaml").is_file()
        }
        records = {stage: read_record(place / "record.json") for stage, place in stages.items()}
        own = [place / file for file in ("mask.json", RECOVERS) for place in stages.values()]
        mask = _first_mask([*own, *(config["model"]["init_args"].get("mask") for config in configs.values())])
        settings = dict(pair for stage, config in configs.items() for pair in _settings(stage, config))
        return cls(name, mask, settings, records, read_rows(stages), evaluate, tasks, benchmark)

    @property
    def verdicts(self) -> list[bool]:
        """Whether the last model that was judged is right on each row; empty without such a judgement."""
        listed = judged(self.evaluate)
        return [verdict == "1" for verdict in listed[-1].get("correct", "")] if listed else []

    @property
    def row_kl(self) -> dict[str, Array]:
        """Each row's KL, summed over its tokens, and their number, ``[2, R]``: of ``kl`` and ``cut_kl``.

        These are the last model that was judged, and its cut.
        """
        *others, last = self.evaluate.get("models") or [{}]
        named = [*(("cut_kl", m) for m in others if Path(m["path"]).name == "cut"), ("kl", last)]
        return {key: np.array([m["row_kl"], m["row_tokens"]]) for key, m in named if "row_kl" in m}

    @property
    def figures(self) -> Record:
        """Figures of the last model that was judged and of its cut, and what all stages cost together."""
        models = models_of(self.evaluate, self.tasks, self.benchmark) if self.evaluate else [{}]
        found = models[-1] | {"name": self.name}
        for model in models[:-1]:
            if model["name"] == "cut" and "kl" in model:
                found |= {f"cut_{key}": model[key] for key in ("kl", "kl_interval") if key in model}
        for key in ("tokens", "seconds", "steps"):
            if spent := [record[key] for record in self.records.values() if key in record]:
                found |= {key: sum(spent)}
        for record in self.records.values():  # of a metric of two stages the later one's
            held_out = {k: v for k, v in record.get("metrics", {}).items() if k.startswith("val/")}
            found |= {"validation": found.get("validation", {}) | held_out} if held_out else {}
        if self.rows:
            found |= {"distinct_tokens": Distinct().unite(self.rows.values()).tokens}
        if commits := [record["commit"] for record in self.records.values() if record.get("commit")]:
            found |= {"commit": ", ".join(dict.fromkeys(commits))}
        if self.mask is not None:
            found |= {"removed": self.mask.missing}
            found |= {"mask_kl": self.mask.metrics["kl"]} if "kl" in self.mask.metrics else {}
            if "forward_tokens" in self.mask.metrics:
                found |= {"search_forward_tokens": self.mask.metrics["forward_tokens"]}
        return found


def _is_stage(directory: Path) -> bool:
    return any((directory / file).is_file() for file in _OF_A_STAGE)


def _first_mask(paths: Iterable[Path | str | None]) -> Mask | None:
    return next((Mask.load(path) for path in paths if path and Path(path).is_file()), None)


def _settings(stage: str, config: Record) -> Iterator[tuple[str, Any]]:
    """Yield the settings of a stage that say what it does; one alone is named by its model's module."""
    name = stage or config["model"]["class_path"].split(".")[-2]
    for part in PARTS:
        for key, value in flat(config.get(part), part):
            if not key.startswith(_ELSEWHERE):
                yield f"{name}: {key}", value


def flat(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield the single values within a config, each with its key.

    A part of a list is named by its class, or by the class that it holds; a second one of the same class is
    numbered.
    """
    if isinstance(value, dict) and value:
        for name, part in value.items():
            yield from flat(part, f"{key}.{name}")
    elif isinstance(value, list) and value and all(map(_class_of, value)):
        seen = Counter[str]()
        for part in value:
            name = _class_of(part)
            seen[name] += 1
            yield from flat(part, f"{key}.{name}{seen[name] if seen[name] > 1 else ''}")
    else:
        yield key, value


def _class_of(part: Any) -> str:
    """Return the name of the class that a part of a config names itself or one level below; empty if none."""
    if not isinstance(part, dict):
        return ""
    paths = (inner.get("class_path") for inner in (part, *part.values()) if isinstance(inner, dict))
    return next(filter(None, paths), "").split(".")[-1]
