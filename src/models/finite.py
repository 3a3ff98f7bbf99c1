"""Whether a model's weights are numbers."""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor import DTensor


def not_finite(model: nn.Module) -> str | None:
    """The name of the first parameter that holds a NaN or an infinity, if one does.

    Of parameters in parts, this rank's part is looked at.
    """
    for name, weight in model.named_parameters():
        own = weight.to_local() if isinstance(weight, DTensor) else weight
        if own.is_floating_point() and not own.isfinite().all():
            return name
    return None
