"""Compute fingerprints of documents, by which the corpora of caches are told apart.

Documents are hashed one by one, and the hashes are chained by a polynomial. So the fingerprint of a corpus is
the same wherever its shards end: ``f(ab) = f(a) BASE^len(b) + f(b)`` modulo a prime, for shards a and b.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

PRIME = 2**255 - 19
BASE = int.from_bytes(hashlib.sha256(b"document").digest(), "big") % PRIME


def documents(tokens: NDArray[np.int32], supervised: NDArray[np.bool_], lengths: NDArray[np.int64]) -> str:
    """Return a fingerprint of documents, hexadecimal, that tells apart other tokens, labels or order.

    Args:
        tokens: ``[S]`` tokens of all documents, laid end to end.
        supervised: ``[S]`` whether each token has a label.
        lengths: ``[D]`` tokens of each document.
    """
    return chained((digest, 1) for digest in _each(tokens, supervised, lengths))


def chained(parts: Iterable[tuple[str, int]]) -> str:
    """Return the fingerprint of a corpus from those of its consecutive parts, without their documents.

    Args:
        parts: fingerprint and number of documents of each part, in order.
    """
    value = 0
    for part, count in parts:
        value = (value * pow(BASE, count, PRIME) + int(part, 16)) % PRIME
    return f"{value:064x}"


def _each(
    tokens: NDArray[np.int32], supervised: NDArray[np.bool_], lengths: NDArray[np.int64]
) -> Iterator[str]:
    ends = np.cumsum(lengths)
    for start, end in zip(ends - lengths, ends, strict=True):
        digest = hashlib.sha256(np.ascontiguousarray(tokens[start:end], dtype="<i4").tobytes())
        digest.update(np.ascontiguousarray(supervised[start:end], dtype=bool).tobytes())
        yield digest.hexdigest()
