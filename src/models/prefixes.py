"""Remember the residual stream of a batch, so that a mask costs what lies behind its first difference.

Two masks that agree on their first u units have the same stream in front of unit u, to the last bit. So the
masks of a walk form a tree of shared prefixes. In a walk that goes through it depth first, which sorting the
masks gives, each edge is computed once: 120 instead of 240 layers to close each of 16 alone.

Shapes: B batch, T tokens, H hidden, U units in order of computation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

Front = tuple[float, ...]
"""Gates of the first units."""


class Prefixes:
    """Holds streams of one batch: those of the open model, and those along the last mask.

    They are right for one batch and one state of the weights.

    Args:
        every: streams are kept in front of each unit whose number this divides; None keeps no stream.

    Attributes:
        start: unit at which the present mask begins; none in front of it needs to run.
    """

    def __init__(self, every: int | None = 1) -> None:
        self.every, self.start = every, 0
        self._gates: Front = ()
        self._streams: dict[Front, Tensor] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def begin(self, gates: Iterable[float]) -> None:
        """Take the gates ``[U]`` of the next pass; forget the streams that neither it nor open gates have."""
        self._gates = tuple(gates)
        along = {front for front in self._streams if front == self._gates[: len(front)]}
        self.start = max(map(len, along), default=0)
        self._streams = {f: h for f, h in self._streams.items() if f in along or set(f) == {1.0}}

    def stream(self, unit: int, h_BTH: Tensor) -> Tensor:
        """Return the stream in front of a unit, the present one or a later: it is remembered or ``h_BTH``."""
        if unit == 0 or self.every is None or unit % self.every:
            return h_BTH
        return self._streams.setdefault(self._gates[:unit], h_BTH)

    def apart(self) -> Iterator[Prefixes]:
        """Give each stream that is held now, alone."""
        for front, h_BTH in list(self._streams.items()):
            alone = Prefixes(self.every)
            alone._streams[front] = h_BTH
            yield alone


class PrefixMemory:
    """Holds the prefixes of several batches within a number of streams.

    What a batch in use needs comes first; of the others, the streams of the open model stay as far as there
    is room, those of the first batches first.

    Args:
        units: number of units, U.
        limit: most streams that are held at a time; fewer than two hold none.

    Attributes:
        every: streams are kept in front of each unit whose number this divides; None keeps none.
    """

    def __init__(self, units: int, limit: int) -> None:
        self.units, self.limit = units, limit
        fitting = (every for every in range(1, units) if 2 * ((units - 1) // every) <= limit)
        self.every = next(fitting, None)
        self._open: dict[int, Prefixes] = {}

    def __len__(self) -> int:
        return sum(map(len, self._open.values()))

    @contextmanager
    def of(self, batch: int) -> Iterator[Prefixes]:
        """Give the prefixes of a batch; after the block, those along its last mask are forgotten."""
        prefixes = self._open.pop(batch, None) or Prefixes(self.every)
        yield prefixes
        prefixes.begin([1.0] * self.units)
        in_use = 2 * ((self.units - 1) // self.every) if self.every else 0
        if len(self) + len(prefixes) + in_use <= self.limit:
            self._open[batch] = prefixes
