"""Give the positions of a stream to another number of ranks, so that no document is lost or repeated.

The shares of the corpus stay as they were when the run began; only the ranks that read them change. A rank
reads each of its shares in a lane (:mod:`src.data.stream`): share k belongs to rank ``k % world``, as its
lane ``k // world``. So all ranks together read the same shares in the same order. With the same global batch,
for example half the ranks and two micro-batches a step, every step has the same rows.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import reduce
from operator import add

from src.data.reader import State
from src.data.statistics import Statistics
from src.errors import ConfigError


def redistribute(positions: list[State], world: int) -> list[State]:
    """Return positions for ``world`` ranks that go on where an earlier number of ranks stopped.

    Args:
        positions: position of each earlier rank, as a checkpoint holds them.
        world: number of ranks now.

    Raises:
        ConfigError: the shares cannot be divided by so many ranks.
    """
    before = len(positions)
    if before == world:
        return positions
    shares = before * len(positions[0]["lanes"])
    if shares % world:
        fits = [str(n) for n in range(1, shares + 1) if shares % n == 0]
        raise ConfigError(
            f"data: the checkpoint's corpus is dealt into {shares} shares, which {world} ranks cannot "
            f"divide. Use {', '.join(fits[:-1])} or {fits[-1]} devices, or start anew without the checkpoint."
        )
    states = [positions[k % before]["lanes"][k // before] for k in range(shares)]
    counts = reduce(add, (Statistics(**position["statistics"]) for position in positions))
    first = positions[0]
    return [
        {
            **first,
            "turn": first["turn"] * before // world % (shares // world),
            "lanes": states[rank::world],
            "statistics": asdict(counts if rank == 0 else Statistics()),
        }
        for rank in range(world)
    ]
