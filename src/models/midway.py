"""Try whether a pass of a gated model may start at any unit, from the stream remembered there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from src.models.gated import Gates
from src.models.prefixes import Prefixes


@torch.no_grad()
def resumes(gates: Gates, run: Callable[[], Tensor]) -> bool:
    """Return whether a pass of the open model may start at any unit, from the stream remembered there.

    It must end as the whole pass does, to the last bit. It does not where a layer hands on more than the
    stream, such as keys and values that others borrow, or returns more than it.

    Args:
        gates: of the model.
        run: runs it on a few tokens; returns its final hidden states.
    """
    with gates.use(None):
        expected = run()
    if not gates.plain:
        return False
    prefixes = Prefixes()
    with gates.remember(prefixes), gates.use(None):
        equal = torch.equal(run(), expected)
    for one in prefixes.apart():
        with gates.remember(one), gates.use(None):
            equal = equal and torch.equal(run(), expected)
    return equal
