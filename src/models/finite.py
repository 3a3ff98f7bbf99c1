"""Find weights of a model that are not finite numbers."""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor import DTensor


def not_finite(model: nn.Module) -> str | None:
    """Return the name of the first parameter that holds a NaN or an infinity; None if all are finite.

    Where ranks hold parts of a parameter, this rank looks at its own.
    """
    for name, weight in model.named_parameters():
        own = weight.to_local() if isinstance(weight, DTensor) else weight
        if own.is_floating_point() and not own.isfinite().all():
            return name
    return None
