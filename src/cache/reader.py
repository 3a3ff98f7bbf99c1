"""Open a cache for reading, and check every shard against its checksum.

A shard is fetched whole, once, through fsspec (a local path, ``hf://``, ``s3://``, ...). The bytes that are
checked are the bytes that are decoded.
"""

from __future__ import annotations

import hashlib

from src.cache.fingerprint import chained
from src.cache.manifest import REMEDY, Manifest, fetch, sizes
from src.cache.shards import Rows, decode
from src.errors import ConfigError


class Cache:
    """Opens a complete cache for reading.

    Args:
        path: directory or URL of the cache.

    Attributes:
        about: manifest of the first part; what it says of teacher, tokenizer and k holds for all parts.
        shards: path within the cache, and description, of each shard of all parts.
        corpus: fingerprint of all documents, in order.

    Raises:
        ConfigError: there is none, it is incomplete, a shard is missing, or its parts disagree.
    """

    def __init__(self, path: str) -> None:
        self.path = path.rstrip("/")
        first = Manifest.load(self.path)
        if first is None:
            raise ConfigError(
                f"cache: there is none in '{path}'. Write it: predict --config configs/cache/topk.yaml"
            )
        self.parts = [first]
        for part in range(1, first.parts):
            other = Manifest.load(self.path, part)
            if other is None or other.identity != first.identity:
                raise ConfigError(f"cache: part-{part} of '{path}' is missing or of another cache.")
            self.parts.append(other)
        if not all(part.complete for part in self.parts):
            raise ConfigError(f"cache: '{path}' is incomplete; run the same predict command again to resume.")
        self.about = first
        self.shards = [(f"part-{m.part}/{s.file}", s) for m in self.parts for s in m.shards]
        self._check_sizes()
        self.corpus = chained((m.corpus, m.rows) for m in self.parts)[:16]

    @property
    def mean_entropy(self) -> float:
        """Mean entropy of the teacher over all positions, nats."""
        positions = sum(m.positions for m in self.parts)
        return sum(m.mean_entropy * m.positions for m in self.parts) / positions

    def _check_sizes(self) -> None:
        """Refuse a cache with a shard that is missing or of the wrong size, now and not in mid-run."""
        lengths = sizes([f"{self.path}/{name}" for name, _ in self.shards])
        for (name, shard), size in zip(self.shards, lengths, strict=True):
            if size != shard.bytes:
                fault = "is missing" if size is None else f"has {size:,} bytes, not {shard.bytes:,}"
                raise ConfigError(f"cache: '{self.path}/{name}' {fault}. {REMEDY}")

    def read(self, index: int) -> Rows:
        """Return the rows of shard ``index``, after a check of its checksum.

        Raises:
            ConfigError: the file is missing or damaged.
        """
        name, shard = self.shards[index]
        data = fetch(f"{self.path}/{name}")
        if data is None:
            raise ConfigError(f"cache: '{self.path}/{name}' cannot be read: it is missing.")
        if len(data) != shard.bytes or hashlib.sha256(data).hexdigest() != shard.sha256:
            raise ConfigError(
                f"cache: '{self.path}/{name}' is damaged: its checksum differs from the manifest's. {REMEDY}"
            )
        return decode(data, self.about.k)
