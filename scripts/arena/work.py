"""From runs to jobs: what each needs, where it lives, and which of them are the same.

A directory's name ends in the fingerprint of everything that its result depends on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.arena import stages
from scripts.arena.plan import Gone, Plan, Run, fingerprint
from scripts.lab.jobs import Job

TEXT = {split: f"data.init_args.{split}" for split in ("train", "validation")}
"""Keys of an experiment for the text of a split; a plan may say ``{train: 620, validation: 128}`` there."""


class Work:
    """The jobs of a plan.

    Args:
        plan: what is to be done.
        root: directory of the plan's jobs.
    """

    def __init__(self, plan: Plan, root: Path) -> None:
        self.plan, self.root = plan, root
        self.identity = [weights(plan.teacher), dict(plan.data)]
        """What every job depends on: the teacher and the problems."""

    def job(self, label: str, stage: str, name: str, about: Any, **arguments: Any) -> Job:
        """A job under a readable name and a fingerprint."""
        mark = fingerprint(self.identity, stage, about)
        return Job(label, getattr(stages, stage), self.root / stage / f"{name}-{mark}", arguments)

    @property
    def data(self) -> Job:
        """The rows of the three splits."""
        if parts := self.plan.data.get("files"):
            return self.job("data", "files", "data", None, parts=parts)
        sizes = {key: value for key, value in self.plan.data.items() if key != "seed"}
        return self.job("data", "data", "data", None, sizes=sizes, seed=self.plan.data["seed"])

    @property
    def cache(self) -> Job | None:
        """The teacher's cache on the training problems, if recoveries read one."""
        stage = self.plan.cache
        if stage is None:
            return None
        where = {"model.init_args.model": self.plan.teacher, "data.init_args.train": self._rows("train")}
        settings = {**stage.settings, **where}
        return self.job(
            "teacher's cache", "cache", "cache", stage.content, configs=stage.configs, settings=settings
        )

    @property
    def teacher(self) -> Job:
        """The teacher, judged."""
        return self.job(
            "teacher", "teacher", "teacher", None, model=self.plan.teacher, rows=self._rows("test")
        )

    def _seeded(self, seed: int) -> dict[str, Any]:
        """Settings of a stage on the teacher."""
        keys = {"model.init_args.model": self.plan.teacher, "data.init_args.tokenizer": self.plan.teacher}
        return {"seed_everything": seed, "data.init_args.seed": seed, **keys}

    def search(self, run: Run) -> Job:
        """The search of a run, or the mask it is given."""
        if run.removed is not None:
            gone = list(run.removed)
            return self.job(f"mask {run}", "given", _dashed(gone), gone, removed=gone)
        own = self._seeded(run.search_seed)
        own |= {"model.init_args.ratio": run.ratio, "model.init_args.policy.init_args.seed": run.search_seed}
        told = run.search.settings
        where = {key: self._part(told.get(key), split) for split, key in TEXT.items()}
        settings = {**told, **own, **where}
        name = f"{100 * run.ratio:g}-s{run.search_seed}"
        about = [run.search.content, own]
        return self.job(f"search {run}", "search", name, about, configs=run.search.configs, settings=settings)

    def cut(self, run: Run, removed: Gone) -> Job:
        """A mask, judged without recovery but with the repair that the run asks for."""
        gone, repair = list(removed), self._repair(run)
        return self.job(
            f"cut {run}", "cut", _dashed(gone), [gone, repair] if repair else gone,
            model=self.plan.teacher, removed=gone, rows=self._rows("test"), repair=repair,
        )  # fmt: skip

    def recover(self, run: Run, removed: Gone) -> Job:
        """A mask, recovered and judged; the same mask under the same recovery is the same job."""
        assert run.recover is not None
        gone = list(removed)
        own = self._seeded(run.seed)
        cache, repair = self.cache, self._repair(run)
        if repair:
            path = "src.repair.linear_patch.LinearPatch"
            own["model.init_args.patch"] = {"class_path": path, "init_args": repair}
        told = run.recover.settings
        train = f"{cache.at}/cache" if cache else self._part(told.get(TEXT["train"]), "train")
        settings = {**told, **own, TEXT["train"]: train}
        about = [run.recover.content, own, gone, self.plan.cache and self.plan.cache.content]
        return self.job(
            f"recover {run}", "recover", f"{_dashed(gone)}-s{run.seed}", about, model=self.plan.teacher,
            removed=gone, rows=self._rows("test"), configs=run.recover.configs, settings=settings,
        )  # fmt: skip

    def _repair(self, run: Run) -> dict[str, Any] | None:
        return {"data": self._rows("validation"), **run.repair} if run.repair else None

    def _part(self, rows: Mapping[str, int] | None, split: str) -> Any:
        """The problems of a split, or so many of the first of each split that a plan names."""
        if not rows:
            return self._rows(split)
        return [{"path": self._rows(name), "rows": count} for name, count in rows.items()]

    def _rows(self, split: str) -> str:
        return str(self.data.at / f"{split}.jsonl")


def weights(model: str) -> str:
    """Checksum of a model's directory."""
    digest = hashlib.sha256()
    for file in sorted(Path(model).iterdir()):
        if file.suffix in (".safetensors", ".json"):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def _dashed(units: Gone) -> str:
    return text if len(text := "-".join(map(str, units))) <= 100 else fingerprint(units)
