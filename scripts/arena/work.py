"""From runs to jobs: what each needs, where it lives, and which of them are the same.

A directory's name ends in the fingerprint of everything that its result depends on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scripts.arena.plan import Plan, Run, fingerprint
from scripts.arena.pool import Job


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
        return Job(label, stage, self.root / stage / f"{name}-{mark}", arguments)

    @property
    def data(self) -> Job:
        """The problems of the three splits."""
        sizes = {key: value for key, value in self.plan.data.items() if key != "seed"}
        return self.job("data", "data", "data", None, sizes=sizes, seed=self.plan.data["seed"])

    @property
    def cache(self) -> Job:
        """The teacher's cache on the training problems."""
        stage = self.plan.cache
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

    def search(self, run: Run) -> Job:
        """The search of a run."""
        own = {
            "seed_everything": run.search_seed,
            "model.init_args.model": self.plan.teacher,
            "model.init_args.ratio": run.ratio,
            "model.init_args.policy.init_args.seed": run.search_seed,
            "data.init_args.tokenizer": self.plan.teacher,
            "data.init_args.seed": run.search_seed,
        }
        where = {f"data.init_args.{split}": self._rows(split) for split in ("train", "validation")}
        settings = {**run.search.settings, **own, **where}
        name = f"{100 * run.ratio:g}-s{run.search_seed}"
        about = [run.search.content, own]
        return self.job(f"search {run}", "search", name, about, configs=run.search.configs, settings=settings)

    def cut(self, run: Run, removed: Iterable[int]) -> Job:
        """A mask, judged without recovery."""
        gone, rows = list(removed), self._rows("test")
        return self.job(
            f"cut {run}", "cut", _dashed(gone), gone, model=self.plan.teacher, removed=gone, rows=rows
        )

    def recover(self, run: Run, removed: Iterable[int]) -> Job:
        """A mask, recovered and judged; the same mask under the same recovery is the same job."""
        assert run.recover is not None
        gone = list(removed)
        own = {
            "seed_everything": run.seed,
            "model.init_args.model": self.plan.teacher,
            "data.init_args.tokenizer": self.plan.teacher,
            "data.init_args.seed": run.seed,
        }
        settings = {**run.recover.settings, **own, "data.init_args.train": f"{self.cache.at}/cache"}
        about = [run.recover.content, own, gone, self.plan.cache.content]
        return self.job(
            f"recover {run}", "recover", f"{_dashed(gone)}-s{run.seed}", about, model=self.plan.teacher,
            removed=gone, rows=self._rows("test"), configs=run.recover.configs, settings=settings,
        )  # fmt: skip

    def _rows(self, split: str) -> str:
        return str(self.data.at / f"{split}.jsonl")


def weights(model: str) -> str:
    """Checksum of a model's directory."""
    digest = hashlib.sha256()
    for file in sorted(Path(model).iterdir()):
        if file.suffix in (".safetensors", ".json"):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def _dashed(layers: list[int]) -> str:
    return "-".join(map(str, layers))
