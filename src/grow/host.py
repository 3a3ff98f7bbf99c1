"""The host of a growth: a parent that holds the weights of its recovered cut.

A host is the parent with the recovered weights in the kept units, and in all that lies outside of the layers.
Cut by the mask of the recovery, it is the recovered model, to the last bit. Cut by a mask that keeps more, it
is that model with some of the parent's own units put back. So gates, cut and proof take a grown model as they
take any other cut.

Shapes: U units.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from src.errors import ConfigError
from src.mask import Mask
from src.models.cut import kept_weights
from src.models.layers import decoder_layers
from src.units.kinds import KINDS

OUTSIDE = -1
"""What lies outside of the layers (embeddings, final norm, head), as if it were a kept unit."""


class Host:
    """Turns a parent into a host, in place; the student keeps the weights that the parent gives up.

    Args:
        parent: the whole model.
        student: its recovered cut, in the same type.
        mask: of that cut.

    Attributes:
        model: the parent, as the host.
        gates: the gates on its units, all open.
        parts: the kept units and :data:`OUTSIDE`, each with recovered weights at first.

    Raises:
        ConfigError: the student is no cut of the parent, or it has a part of a tensor of the parent.
    """

    def __init__(self, parent: PreTrainedModel, student: PreTrainedModel, mask: Mask) -> None:
        self.model, self.mask = parent, mask
        self.parts = frozenset((OUTSIDE, *mask.keep))
        self.gates = KINDS[mask.unit].gate(parent)
        self._path, _ = decoder_layers(parent)
        mine, theirs = parent.state_dict(), student.state_dict()
        origin = kept_weights({name: name for name in mine}, parent, mask)
        for name, tensor in theirs.items():
            if name not in origin or mine[origin[name]].shape != tensor.shape:
                raise ConfigError(
                    f"--model: its tensor '{name}' {list(tensor.shape)} is none of the parent's "
                    f"'{parent.config.model_type}'. It is of another model, or a part of one tensor for all "
                    f"layers, into which nothing is put back."
                )
        self._idle: dict[int, dict[str, Tensor]] = {part: {} for part in self.parts}
        """By part, the weights that are not in use: the parent's, after the exchange that follows."""
        once = {tensor.data_ptr(): name for name, tensor in theirs.items()}  # tied ones have two names
        for name in once.values():
            self._idle[self._part(origin[name], theirs[name])][origin[name]] = theirs[name]
        self.exchange(self.parts)

    @torch.no_grad()
    def exchange(self, parts: Iterable[int]) -> None:
        """Give parts the parent's weights in the place of the recovered ones, or the other way round."""
        used = self.model.state_dict()
        for part in parts:
            for name, idle in self._idle[part].items():
                held = used[name].clone()
                used[name].copy_(idle)
                idle.copy_(held)

    def _part(self, name: str, tensor: Tensor) -> int:
        """The part that a weight belongs to."""
        if not name.startswith(f"{self._path}."):
            return OUTSIDE
        layer, _, rest = name.removeprefix(f"{self._path}.").partition(".")
        shares = self.gates.share(int(layer), rest, torch.ones_like(tensor, device="cpu"))
        return self.gates.each * int(layer) + int(shares.argmax())
