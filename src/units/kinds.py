"""The kinds of unit by name, each with its number in a layer, its space and its gates."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from transformers import PretrainedConfig, PreTrainedModel

from src.mask import Unit
from src.models.gated import GatedLayers, Gates
from src.units.groups import InEach
from src.units.half_gates import HalfGates
from src.units.spaces import Alternating, AnyOf, Space
from src.units.width import Width, find_width
from src.units.width_gates import WidthGates


@dataclass(frozen=True)
class Kind:
    """A kind of unit.

    Attributes:
        gates: puts gates on the units of a model.
        each: number of units in a layer; None where the model says, of units of width.
        spaces: class of the space of legal sets; of width units, of the sets of one layer.
    """

    gates: Callable[[PreTrainedModel, bool], Gates]
    each: int | None
    spaces: type[Space] = AnyOf

    @property
    def wide(self) -> bool:
        """Whether units are parts of the width, of which each layer loses as many."""
        return self.each is None

    def of(self, layers: Iterable[int]) -> list[int]:
        """Return the units that stay with some layers; of units of width none."""
        each = self.each or 0
        return [each * layer + part for layer in layers for part in range(each)]

    def space(self, layers: int, width: int, remove: int, pinned: Iterable[int] = ()) -> Space:
        """Return the space of masks.

        Args:
            layers: of the model.
            width: width units of each layer; only units of width need it.
            remove: width units to remove from each layer; or layers, or as many halves as these have.
            pinned: layers that stay.
        """
        if self.each is None:
            return InEach(layers, self.spaces(width, width - remove))
        return self.spaces(self.each * layers, self.each * (layers - remove), self.of(pinned))

    def gate(self, model: PreTrainedModel, checkpoint_activations: bool = False) -> Gates:
        """Put gates on the units of a model, all open."""
        return self.gates(model, checkpoint_activations)


KINDS: dict[Unit, Kind] = {
    "layer": Kind(GatedLayers, 1),
    "half": Kind(HalfGates, 2, Alternating),
    "kv_group": Kind(partial(WidthGates, "kv_group"), None),
    "channel": Kind(partial(WidthGates, "channel"), None),
}


def width_of(config: PretrainedConfig, unit: Unit) -> Width | None:
    """Return where the width units of a model lie; None for other units.

    Raises:
        Misfit: the layers do not hold such units in a way that can be cut.
    """
    return find_width(config, unit) if KINDS[unit].wide else None
