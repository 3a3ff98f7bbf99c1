"""A student with its removed units still open: what a recovery runs while they close.

The model has the parent's form. Its kept units, and all that lies outside of the layers, hold the student's
own parameters, the same tensors; its removed units hold the parent's weights, frozen. What trains it trains
the student. With the gates of the removed units at 1 and the parent's weights in the student it is the
parent; with the gates at 0 it is the student.

Shapes: B batch, T tokens, H hidden, U units.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from src.errors import ConfigError
from src.mask import Mask
from src.models.cut import kept_weights
from src.models.head import OutputHead
from src.units.kinds import KINDS


class Opened:
    """Runs a student between its removed units.

    Args:
        parent: the whole model; its removed units are used as they are.
        student: the cut model.
        mask: of the cut.
        recompute: recompute open units in the backward pass instead of storing their activations.

    Attributes:
        model: the student with the removed units.
        gate: how open these are, in (0, 1].

    Raises:
        ConfigError: the family holds one tensor for all layers, of which the student has a part.
    """

    def __init__(
        self, parent: PreTrainedModel, student: PreTrainedModel, mask: Mask, recompute: bool = False
    ) -> None:
        with no_init_weights():
            self.model = type(parent)._from_config(parent.config, dtype=parent.dtype)
        state = parent.state_dict()
        self.model.load_state_dict(state, assign=True)
        self.model.requires_grad_(False)
        origin = kept_weights({name: name for name in state}, parent, mask)
        for name, parameter in student.named_parameters():
            place, _, leaf = origin[name].rpartition(".")
            if state[origin[name]].shape != parameter.shape:
                raise ConfigError(
                    f"model.closing: a '{parent.config.model_type}' holds one tensor for all layers "
                    f"({origin[name]}), of which the cut has a part. Set it to 0."
                )
            setattr(self.model.get_submodule(place), leaf, parameter)
        self.model.tie_weights()
        self.model.train(student.training)
        self.gates = KINDS[mask.unit].gate(self.model, recompute)
        self.head, self.gate = OutputHead(self.model), 1.0
        self._removed = list(mask.removed)

    def to(self, device: torch.device) -> None:
        """Bring the removed units to a device; the student is there."""
        nn.Module.to(self.model, device)

    def hidden(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the hidden states ``[B, T, H]`` after the final norm, with the removed units at the gate."""
        gates_U = torch.ones(len(self.gates), device=self.model.device)
        gates_U[self._removed] = self.gate
        with self.gates.use(gates_U):
            return self.head.hidden(batch)
