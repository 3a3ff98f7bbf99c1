"""Remember the residual stream of a batch, so that only the units behind a mask's first change run again.

Two masks that agree on their first u units have the same stream in front of unit u, to the last bit. So masks
form a tree of shared prefixes (the gates of the first units). If masks are measured in sorted order, the tree
is walked depth first, and each of its edges is computed once: 120 instead of 240 layers to close each of 16
layers alone.

Shapes: B batch, T tokens, H hidden, U units in order of computation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

Front = tuple[float, ...]
"""Gates of the first units."""


class Prefixes:
    """Holds streams of one batch in front of units, as the open model and the last mask's model compute them.

    They hold for that batch as long as the weights stay the same. A stream that was computed with an autograd
    graph keeps it, so a pass that starts there has the gradients of a whole one.

    Args:
        every: streams are kept in front of each unit whose number this divides; None keeps no stream.
        opened: whether those of the open model stay although the next mask does not share them.

    Attributes:
        start: first unit that the present pass has to run; the stream in front of it is remembered.
        behind: the stream behind that unit when it was open, without a graph, if an earlier pass kept it.
        graded: the first so many units keep a graph even where autograd is off, for passes that follow.
    """

    def __init__(self, every: int | None = 1, opened: bool = True) -> None:
        self.every, self.opened, self.start, self.graded = every, opened, 0, 0
        self.behind: Tensor | None = None
        self._gates: Front = ()
        self._streams: dict[Front, Tensor] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def begin(self, gates: Iterable[float]) -> None:
        """Prepare a pass: find the unit at which it can start, and forget the streams that are of no use.

        Streams along these gates stay, and those of the open model if asked.

        Args:
            gates: of the pass, ``[U]``.
        """
        self._gates = tuple(gates)
        along = {front for front in self._streams if front == self._gates[: len(front)]}
        self.start = max(map(len, along), default=0)
        behind = self._streams.get((*self._gates[: self.start], 1.0))
        self.behind = None if behind is None else behind.detach()
        stay = along | {front for front in self._streams if self.opened and set(front) == {1.0}}
        self._streams = {front: h_BTH for front, h_BTH in self._streams.items() if front in stay}

    def stream(self, unit: int, h_BTH: Tensor) -> Tensor:
        """Return the stream ``[B, T, H]`` in front of a unit: the remembered one, or else ``h_BTH``.

        Then ``h_BTH`` is remembered, if the unit is one in front of which streams are kept.

        Args:
            unit: at or behind :attr:`start`.
            h_BTH: the stream that the pass has computed there.
        """
        if unit == 0 or self.every is None or unit % self.every:
            return h_BTH
        return self._streams.setdefault(self._gates[:unit], h_BTH)

    def apart(self) -> Iterator[Prefixes]:
        """Yield, for each stream that is held now, a new :class:`Prefixes` that holds this stream alone.

        So a pass can be made to start at each of them in turn, which :func:`src.models.midway.resumes` tries.
        """
        for front, h_BTH in list(self._streams.items()):
            alone = Prefixes(self.every)
            alone._streams[front] = h_BTH
            yield alone


class PrefixMemory:
    """Holds the :class:`Prefixes` of several batches, with a limit on the number of streams.

    The batch in use comes first. Of the other batches, the streams of the open model stay as far as there is
    room, those of the first batches first.

    Args:
        units: number of units, U.
        limit: largest number of streams to hold at a time; below two, none is held.

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
        """Give the :class:`Prefixes` of a batch for the block; then forget those along its last mask.

        Args:
            batch: number of the batch.
        """
        prefixes = self._open.pop(batch, None) or Prefixes(self.every)
        yield prefixes
        prefixes.begin([1.0] * self.units)
        in_use = 2 * ((self.units - 1) // self.every) if self.every else 0
        if len(self) + len(prefixes) + in_use <= self.limit:
            self._open[batch] = prefixes
