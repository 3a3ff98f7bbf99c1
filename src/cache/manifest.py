"""The manifest of a cache says whose signal it holds, on which tokens, in which files; checksums show damage.

A cache is a directory with one part for each process that wrote it::

    part-0/manifest.json  part-0/00000.parquet  part-0/00001.parquet  ...  part-1/...

A manifest is replaced, whole, after each shard. It carries the checksum of every shard and, against edits, of
itself. The checksums find faults, not forgers: whoever rewrites data and manifest alike is believed.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any, cast

import fsspec

from src.cache.fingerprint import chained
from src.cache.shards import Precision
from src.errors import ConfigError
from src.files import write_json

VERSION = 2


@dataclass(frozen=True)
class Shard:
    """Describes one Parquet file of a cache.

    Attributes:
        file: its name.
        batches: number of batches of the corpus that it holds.
        rows: number of documents.
        tokens: number of their tokens.
        positions: number of supervised positions, each with one signal.
        bytes: size of the file.
        sha256: checksum of the file.
        corpus: fingerprint of its documents, in order (:func:`src.cache.fingerprint.documents`).
        entropy: sum of the teacher's entropies, nats.
    """

    file: str
    batches: int
    rows: int
    tokens: int
    positions: int
    bytes: int
    sha256: str
    corpus: str
    entropy: float


@dataclass(frozen=True)
class Manifest:
    """Describes one part of a cache: the shards that one process wrote.

    The fields before ``part``, and ``compute`` and ``day``, must agree in all parts, and on resume.

    Attributes:
        teacher: id of the teacher.
        revision: its Hub revision, or None.
        weights: fingerprint of its weights (:func:`src.models.fingerprint.weights_fingerprint`); None if
            unknown.
        quantize: its quantisation, or None.
        tokenizer: fingerprint of the tokenizer.
        vocabulary: number of the teacher's logits.
        k: tokens kept at each position.
        precision: how log-probabilities are stored (:mod:`src.cache.shards`).
        parts: number of parts of the cache.
        part: number of this part, from 0.
        complete: whether the corpus was read to its end.
        shards: the files, in order.
        version: version of the format.
        dtype: type of the weights that are not quantised; None in caches that did not note it.
        compute: the trainer's precision; None in caches that did not note it.
        day: what chat templates took for today; None in caches that did not note it.
    """

    teacher: str
    revision: str | None
    weights: str | None
    quantize: str | None
    tokenizer: str
    vocabulary: int
    k: int
    precision: Precision
    parts: int
    part: int = 0
    complete: bool = False
    shards: tuple[Shard, ...] = ()
    version: int = VERSION
    dtype: str | None = None
    compute: str | None = None
    day: str | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that must not change while a cache is written."""
        names = [*(f.name for f in fields(self)[:9]), "compute", "day"]
        return {name: getattr(self, name) for name in names}

    @cached_property
    def corpus(self) -> str:
        """Fingerprint of all tokens, their labels and their order; it is the same wherever shards end."""
        return chained((s.corpus, s.rows) for s in self.shards)

    @property
    def rows(self) -> int:
        """Number of documents."""
        return sum(s.rows for s in self.shards)

    @property
    def positions(self) -> int:
        """Number of supervised positions."""
        return sum(s.positions for s in self.shards)

    @property
    def mean_entropy(self) -> float:
        """Mean entropy of the teacher, nats; ``Distillation(mean_entropy=...)`` takes it."""
        return sum(s.entropy for s in self.shards) / max(1, self.positions)

    @property
    def bytes_per_position(self) -> float:
        """Bytes on disk for each supervised position, the tokens of the corpus included."""
        return sum(s.bytes for s in self.shards) / max(1, self.positions)

    def with_shard(self, shard: Shard) -> Manifest:
        """Return the manifest with one more shard."""
        return replace(self, shards=(*self.shards, shard))

    def save(self, cache: str) -> None:
        """Write the manifest to its part of the directory ``cache``, whole, in place of an older one."""
        content = asdict(self) | {"corpus": self.corpus}
        write_json(f"{cache}/part-{self.part}/manifest.json", {**content, "digest": _digest(content)})

    @classmethod
    def load(cls, cache: str, part: int = 0) -> Manifest | None:
        """Read the manifest of a part of the cache at a directory or URL; None if there is none.

        Raises:
            ConfigError: the file is damaged, was edited, is of another part or version, or cannot be read.
        """
        file = f"{cache}/part-{part}/manifest.json"
        data = fetch(file)
        if data is None:
            return None
        try:
            text = data.decode()
            content = json.loads(text)
            exact = text == json.dumps(content, indent=2) + "\n"
            intact = exact and content.pop("digest") == _digest(content)
        except (ValueError, KeyError, AttributeError, TypeError) as e:
            raise ConfigError(f"cache: '{file}' is damaged ({type(e).__name__}: {e}). {REMEDY}") from e
        if not intact:
            raise ConfigError(f"cache: '{file}' was changed after it was written (digest). {REMEDY}")
        if content["version"] != VERSION:
            raise ConfigError(f"cache: '{file}' has version {content['version']}, expected {VERSION}.")
        if content["part"] != part:
            raise ConfigError(f"cache: '{file}' is that of part-{content['part']}, copied. {REMEDY}")
        del content["corpus"]  # follows from the shards
        return cls(**{**content, "shards": tuple(Shard(**shard) for shard in content["shards"])})


def fetch(file: str) -> bytes | None:
    """Return the bytes of a file or URL; None if there is none.

    Raises:
        ConfigError: it exists, or may exist, and cannot be read.
    """
    if "://" not in file and os.path.exists(file) and not os.path.isfile(file):
        raise ConfigError(f"cache: '{file}' is a directory, a pipe or a device.")
    try:
        with fsspec.open(file, "rb") as stream:
            return cast(bytes, stream.read())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as e:  # each file system has errors of its own
        raise ConfigError(f"cache: '{file}' cannot be read: {type(e).__name__}: {e}.") from e


def sizes(files: list[str]) -> list[int | None]:
    """Return the sizes in bytes of files or URLs of one file system; None for those that are missing.

    Raises:
        ConfigError: the size of a file cannot be read, though it may exist.
    """
    if not files:
        return []
    system, _ = fsspec.core.url_to_fs(files[0])
    lengths: list[int | None] = []
    for file in files:
        try:
            lengths.append(system.size(system._strip_protocol(file)))
        except FileNotFoundError:
            lengths.append(None)
        except Exception as e:  # each file system has errors of its own
            raise ConfigError(f"cache: '{file}' cannot be read: {type(e).__name__}: {e}.") from e
    return lengths


REMEDY = "Restore it from a copy, or delete the directory and write the cache again."


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=asdict).encode()).hexdigest()
