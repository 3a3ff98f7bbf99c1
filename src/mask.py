"""The one artefact between the stages: ``mask.json``, which layers of which model are kept.

Every method writes it; recovery, export, evaluation and benchmark read nothing else about the search.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from src.errors import ConfigError, did_you_mean
from src.files import write_json

OPTIONAL_TEXT = "text or null", lambda v: v is None or isinstance(v, str)
FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "model": ("text", lambda v: isinstance(v, str)),
    "num_layers": ("a whole number", lambda v: type(v) is int),
    "keep": ("a list of whole numbers", lambda v: isinstance(v, list) and all(type(i) is int for i in v)),
    "method": ("text", lambda v: isinstance(v, str)),
    "revision": OPTIONAL_TEXT,
    "seed": ("a whole number or null", lambda v: v is None or type(v) is int),
    "git_sha": OPTIONAL_TEXT,
    "tokens_seen": ("a whole number", lambda v: type(v) is int),
    "metrics": (
        "figures by name",
        lambda v: isinstance(v, dict) and all(type(x) in (int, float) for x in v.values()),
    ),
}
"""What each field of the file holds, in words and as a test."""


@dataclass(frozen=True)
class Mask:
    """Kept layers of a parent model, and where the choice came from.

    Attributes:
        model: Hub id or directory of the parent.
        revision: its Hub revision, or None.
        num_layers: layers of the parent.
        keep: kept layers, 0-based, rising.
        method: name of the policy that chose them.
        seed: seed of the search, or None.
        git_sha: commit of the code.
        tokens_seen: corpus tokens the search consumed.
        metrics: figures of the search, such as the held-out KL.
    """

    model: str
    num_layers: int
    keep: tuple[int, ...]
    method: str
    revision: str | None = None
    seed: int | None = None
    git_sha: str | None = None
    tokens_seen: int = 0
    metrics: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", tuple(self.keep))
        problems = []
        if not self.keep or list(self.keep) != sorted(set(self.keep)):
            problems.append(f"keep must be a rising list of layers, found {list(self.keep)}")
        elif self.keep[0] < 0 or self.keep[-1] >= self.num_layers:
            problems.append(f"keep must lie in 0..{self.num_layers - 1}, found {list(self.keep)}")
        if problems:
            raise ConfigError(f"mask: {'; '.join(problems)}.")

    @property
    def removed(self) -> tuple[int, ...]:
        """The layers that are not kept."""
        return tuple(i for i in range(self.num_layers) if i not in set(self.keep))

    @classmethod
    def by_hand(cls, model: str, num_layers: int, keep: Iterable[int]) -> Mask:
        """A mask that no search chose."""
        return cls(model, num_layers, tuple(keep), "by hand")

    def check(self, num_layers: int, model: str) -> None:
        """Refuse a mask whose layer count is not that of ``model``."""
        if self.num_layers != num_layers:
            raise ConfigError(
                f"mask: it was made for a model of {self.num_layers} layers ('{self.model}'), but "
                f"'{model}' has {num_layers}. Give the mask of this model, or change the model."
            )

    def save(self, path: str | Path) -> None:
        """Write the mask as JSON; the file appears whole or not at all."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> Mask:
        """Read a mask.

        Raises:
            ConfigError: the file is missing, is not JSON, or has missing, unknown or wrongly typed fields.
        """
        try:
            raw: Any = json.loads(Path(path).read_text())
        except OSError as e:
            raise ConfigError(f"mask: cannot read '{path}' ({e.strerror}). Run a search first.") from e
        except ValueError as e:
            raise ConfigError(f"mask: '{path}' is not JSON ({e}).") from e
        required, known = {"model", "num_layers", "keep", "method"}, set(FIELDS)
        if not isinstance(raw, dict):
            raise ConfigError(f"mask: '{path}' holds a {type(raw).__name__}, not the fields of a mask.")
        if required - set(raw):
            raise ConfigError(f"mask: '{path}' lacks {sorted(required - set(raw))}.")
        for key in set(raw) - known:
            raise ConfigError(f"mask: '{path}' has an unknown field '{key}'.{did_you_mean(key, known)}")
        wrong = [f"{k} must be {FIELDS[k][0]}, found {v!r}" for k, v in raw.items() if not FIELDS[k][1](v)]
        if wrong:
            raise ConfigError(f"mask: in '{path}' {'; '.join(wrong)}.")
        return cls(**raw)

    def __str__(self) -> str:
        strip = "".join("#" if i in set(self.keep) else "." for i in range(self.num_layers))
        return f"[{strip}] keeps {len(self.keep)} of {self.num_layers}, removes {list(self.removed)}"


def git_sha() -> str | None:
    """Commit of the code that runs, with ``+`` when the tree has changes; None outside a repository."""
    try:
        run = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--dirty=+"]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
