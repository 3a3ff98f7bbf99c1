"""Compute the size of a planned cache, and count the passes that a planned search makes beside its steps."""

from __future__ import annotations

from dataclasses import dataclass

from src.callbacks.harden import choose
from src.plan.toy import CountingProbe, TooMany
from src.search import MaskSearch

# Bytes of a stored value, and those measured after compression, of a language model's cache over a vocabulary
# of 49,152 (docs/teacher_cache.md).
_RAW = {"float32": (4, 4), "float16": (2, 2), "compact": (1, 2)}
_COMPRESSED = {"float32": 3.085, "float16": 1.356, "compact": 1.11}
_COMPRESSED_ID, _COMPRESSED_REST = 1.484, {"float32": 8.17, "float16": 5.01, "compact": 5.01}


@dataclass(frozen=True)
class CacheSize:
    """Holds the bytes of a cache.

    Attributes:
        raw: bytes before compression; exact.
        expected: bytes on disk, as estimated from the compression of measured caches.
    """

    raw: int
    expected: int


def cache_size(tokens: int, positions: int, k: int, precision: str = "float16") -> CacheSize:
    """Compute the bytes of a cache.

    Args:
        tokens: tokens of the corpus, each with its id (4 bytes) and whether it is supervised (1).
        positions: supervised positions, each with k ids (4 bytes each) and log-probabilities, an entropy and
            the mass outside.
        k: tokens kept at each position.
        precision: how log-probabilities are stored: ``float32``, ``float16`` or ``compact``.
    """
    value, rest = _RAW[precision]
    raw = tokens * 5 + positions * (k * (4 + value) + 2 * rest)
    each = k * (_COMPRESSED_ID + _COMPRESSED[precision]) + _COMPRESSED_REST[precision]
    return CacheSize(raw, int(positions * each))


def calibration(search: MaskSearch, streams: int = 10**6) -> float | None:
    """Count the forward passes of a batch that a search makes before its first step and after its last.

    Its policy is initialised and its final mask polished on a made-up divergence (:mod:`src.plan.toy`), and
    the measurements are counted.

    Args:
        search: the search; its policy cannot be used again.
        streams: largest number of units' outputs, each for one batch, that its probe holds at a time.

    Returns:
        The number of passes; None for a policy that measures too much to count, such as all masks.
    """
    policy, batches = search.policy, search.calibration_batches
    probe = CountingProbe(policy.units, batches, streams, wide=policy.kind.wide)
    try:
        policy.initialise(probe)
        probe.renew()
        policy.remove = policy.target
        for _, chosen, _ in choose(search, probe, ()):
            # Further candidates, and the first mask, are other masks of the same size.
            share = 1.0 if policy.kind.wide else len(chosen) / policy.units
            others = policy.candidates if policy.candidates > 1 else 0
            probe.forward += batches * share * others
    except TooMany:
        return None
    return probe.forward
