"""``mask.json`` says which units of which model are kept; it is the one artefact between the stages.

Every method writes it; recovery, export, evaluation and benchmark read nothing else about the search.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from src.errors import ConfigError, did_you_mean
from src.files import read_json, write_json

Unit = Literal["layer", "half", "kv_group", "channel"]
HALVES = ("attention", "feed_forward")
WIDE = {"kv_group": "KV groups", "channel": "channels"}
"""Units of a layer's width, with their names in words: a mask removes the same number from every layer."""


def _whole(value: Any) -> bool:
    return isinstance(value, list) and all(type(i) is int for i in value)


def _text(value: Any) -> bool:
    """Return whether a value is text that can name a file."""
    try:
        return isinstance(value, str) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


OPTIONAL_TEXT = "text or null", lambda v: v is None or _text(v)
FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "model": ("text", _text),
    "num_layers": ("a whole number", lambda v: type(v) is int),
    "keep": (
        "a list of whole numbers, one for each of attention and feed_forward, or one for each layer",
        lambda v: (
            _whole(v)
            or (isinstance(v, dict) and set(v) == {*HALVES} and all(map(_whole, v.values())))
            or (isinstance(v, list) and all(map(_whole, v)))
        ),
    ),
    "unit": (f"one of {', '.join(get_args(Unit))}", lambda v: v in get_args(Unit)),
    "method": ("text", _text),
    "revision": OPTIONAL_TEXT,
    "seed": ("a whole number or null", lambda v: v is None or type(v) is int),
    "git_sha": OPTIONAL_TEXT,
    "fingerprint": OPTIONAL_TEXT,
    "tokens_seen": ("a whole number", lambda v: type(v) is int),
    "width": ("a whole number or null", lambda v: v is None or type(v) is int),
    "metrics": (
        "figures by name",
        lambda v: isinstance(v, dict) and all(type(x) in (int, float) for x in v.values()),
    ),
}
"""The type of each field of the file, in words and as a test."""


@dataclass(frozen=True)
class Mask:
    """Says which units of a parent model are kept, and how they were chosen.

    Attributes:
        model: Hub id or directory of the parent.
        revision: its Hub revision, or None.
        num_layers: number of layers of the parent.
        keep: numbers of the kept units, from 0, rising. Number l is layer l; of halves, 2 l is the attention
            of layer l and 2 l + 1 its feed-forward; of KV groups and channels, l W + w is unit w of layer l.
            The file lists halves by kind, and KV groups and channels by layer (:attr:`kept`).
        method: name of the policy that chose them.
        seed: seed of the search, or None.
        git_sha: commit of the code.
        tokens_seen: corpus tokens the search consumed.
        metrics: figures of the search, such as the held-out KL.
        unit: what is kept: ``layer``, ``half``, ``kv_group`` or ``channel``.
        fingerprint: of the parent's weights (:func:`src.models.fingerprint.weights_fingerprint`), or None.
        width: number W of KV groups or channels in a layer of the parent; None for layers and halves.
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
    unit: Unit = "layer"
    fingerprint: str | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", tuple(self.keep))
        if (self.width is not None) is not self.wide:
            raise ConfigError(
                f"mask: width is {self.width} with unit '{self.unit}'; it is the number of units in a layer "
                f"where these are {' or '.join(WIDE)}, and null elsewhere."
            )
        if self.wide:
            self._check_width()
        for kept in {self.attention, self.feed_forward}:
            if not kept or list(kept) != sorted(set(kept)):
                raise ConfigError(f"mask: keep must be a rising list of layers, found {list(kept)}.")
            if kept[0] < 0 or kept[-1] >= self.num_layers:
                raise ConfigError(f"mask: keep must lie in 0..{self.num_layers - 1}, found {list(kept)}.")
        turns = [u % 2 for u in self.keep] == [0, 1] * (len(self.keep) // 2)
        if self.unit == "half" and not (turns and list(self.keep) == sorted(self.keep)):
            raise ConfigError(
                f"mask: the kept halves must take turns, attention first, so that they pair up into layers; "
                f"found attention of {list(self.attention)} and feed-forward of {list(self.feed_forward)}."
            )

    def _check_width(self) -> None:
        inside = all(0 <= unit < self.units for unit in self.keep)
        counts = {len(kept) for kept in self.by_layer} if inside else set()
        if list(self.keep) != sorted(set(self.keep)) or len(counts) != 1 or 0 in counts:
            raise ConfigError(
                f"mask: keep must hold a rising list for each of {self.num_layers} layers, all as long, of "
                f"{WIDE[self.unit]} in 0..{(self.width or 0) - 1}; found lists of {sorted(counts)} units."
            )

    @property
    def wide(self) -> bool:
        """Whether units are KV groups or channels, so that every layer stays and becomes narrower."""
        return self.unit in WIDE

    @property
    def by_layer(self) -> list[list[int]]:
        """The kept KV groups or channels of each layer, counted from 0 in each layer."""
        kept: list[list[int]] = [[] for _ in range(self.num_layers)]
        for unit in self.keep:
            kept[unit // (self.width or 1)].append(unit % (self.width or 1))
        return kept

    @property
    def units(self) -> int:
        """Number of units of the parent."""
        return self.num_layers * (self.width or (2 if self.unit == "half" else 1))

    @property
    def attention(self) -> tuple[int, ...]:
        """For each layer of the cut model, the layer of the parent whose attention it has."""
        if self.wide:
            return tuple(range(self.num_layers))
        return self.keep if self.unit == "layer" else tuple(u // 2 for u in self.keep if u % 2 == 0)

    @property
    def feed_forward(self) -> tuple[int, ...]:
        """For each layer of the cut model, the layer of the parent whose feed-forward it has."""
        if self.wide:
            return self.attention
        return self.keep if self.unit == "layer" else tuple(u // 2 for u in self.keep if u % 2)

    @property
    def depth(self) -> int:
        """Number of layers of the cut model."""
        return len(self.attention)

    @property
    def kept(self) -> tuple[int, ...] | list[list[int]] | dict[str, tuple[int, ...]]:
        """The kept units in the file's form: layers; of halves a dict by kind; of width lists by layer."""
        if self.wide:
            return self.by_layer
        return {kind: getattr(self, kind) for kind in HALVES} if self.unit == "half" else self.keep

    @property
    def listed(self) -> str:
        """The kept units in words; for halves, which attention meets which feed-forward."""
        if self.width is not None:
            return self._counted(len(self.keep) // self.num_layers)
        if self.unit == "layer":
            return str(list(self.keep))
        pairs = zip(self.attention, self.feed_forward, strict=True)
        words = [str(a) if a == f else f"{a} with feed-forward of {f}" for a, f in pairs]
        return f"[{', '.join(words)}]"

    @property
    def missing(self) -> str:
        """The removed units in words."""
        if self.width is not None:
            return self._counted(self.width - len(self.keep) // self.num_layers)
        if self.unit == "layer":
            return str(list(self.removed))
        gone = [sorted({*range(self.num_layers)} - {*kept}) for kept in (self.attention, self.feed_forward)]
        return f"attention of {gone[0]} and feed-forward of {gone[1]}"

    def _counted(self, count: int) -> str:
        return f"{count:,} of {self.width:,} {WIDE[self.unit]} of each layer"

    @property
    def recombines(self) -> bool:
        """Whether some new layer has the attention of one layer and the feed-forward of another."""
        return self.attention != self.feed_forward

    @property
    def reads(self) -> tuple[int, ...]:
        """For each layer of the cut model, the parent's layer whose attention reads its output there.

        That is the attention of the cut model's next layer. For the last one L stands for the final norm.
        """
        return (*self.attention[1:], self.num_layers)

    @property
    def gaps(self) -> tuple[int, ...]:
        """Layers of the cut model right before a gap between two kept layers.

        There is a gap behind a layer if its output is read, in the cut model, by another layer of the parent
        than in the parent itself.
        """
        joints = enumerate(zip(self.feed_forward[:-1], self.reads[:-1], strict=True))
        return tuple(position for position, (writer, reader) in joints if reader != writer + 1)

    @property
    def removed(self) -> tuple[int, ...]:
        """The units that are not kept."""
        return tuple(i for i in range(self.units) if i not in set(self.keep))

    @classmethod
    def by_hand(cls, model: str, num_layers: int, keep: Iterable[int]) -> Mask:
        """Return a mask of layers that no search chose."""
        return cls(model, num_layers, tuple(keep), "by hand")

    def check(self, num_layers: int, model: str) -> None:
        """Raise a :class:`ConfigError` unless ``num_layers``, those of ``model``, is the mask's number."""
        if self.num_layers != num_layers:
            raise ConfigError(
                f"mask: it was made for a model of {self.num_layers} layers ('{self.model}'), but "
                f"'{model}' has {num_layers}. Give the mask of this model, or change the model."
            )

    def save(self, path: str | Path) -> None:
        """Write the mask as JSON; the file appears whole or not at all."""
        write_json(path, {**asdict(self), "keep": self.kept})

    @classmethod
    def load(cls, path: str | Path) -> Mask:
        """Read a mask.

        Raises:
            ConfigError: the file is missing, is not JSON, or has missing, unknown or wrongly typed fields.
        """
        try:
            raw = read_json(path)
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
        raw["keep"] = _units(raw["keep"], raw.get("unit", "layer"), raw.get("width"), path)
        return cls(**raw)

    def __str__(self) -> str:
        if self.wide:
            return f"keeps {self.listed}"
        marks = {(True, True): "#", (True, False): "a", (False, True): "f", (False, False): "."}
        pairs = [(i in self.attention, i in self.feed_forward) for i in range(self.num_layers)]
        strip = "".join(marks[pair] for pair in pairs)
        return f"[{strip}] keeps {self.depth} of {self.num_layers}, removes {self.missing}"


def _units(keep: Any, unit: str, width: int | None, path: str | Path) -> list[int]:
    """Return the kept units as numbers, from the form that the file lists them in."""
    form = dict if unit == "half" else list
    nested = isinstance(keep, list) and keep != [] and isinstance(keep[0], list)
    if not isinstance(keep, form) or nested is not (unit in WIDE):
        raise ConfigError(
            f"mask: in '{path}' keep must be one list for unit 'layer', two lists, attention and "
            f"feed_forward, for 'half', and one list for each layer for {' and '.join(WIDE)}; "
            f"found {keep!r} with '{unit}'."
        )
    if isinstance(keep, dict):
        return sorted(2 * i + half for half, kind in enumerate(HALVES) for i in keep[kind])
    if nested:
        return [layer * (width or 0) + own for layer, kept in enumerate(keep) for own in kept]
    return keep


def git_sha() -> str | None:
    """Return the commit of the running code, with ``+`` if files have changed; None outside a repository."""
    try:
        run = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--dirty=+"]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
