"""The kinds of unit by the names that ``unit:`` takes: how many a layer has, their space, their gates."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from transformers import PretrainedConfig, PreTrainedModel

from src.mask import Unit
from src.models.constraints import Constraints
from src.models.gated import GatedLayers, Gates
from src.units.alternating import Alternating
from src.units.groups import InEach
from src.units.half_gates import HalfGates
from src.units.spaces import AnyOf, Space
from src.units.width import Width, find_width
from src.units.width_gates import WidthGates


@dataclass(frozen=True)
class Kind:
    """A kind of unit: layers, halves of layers, or units of width (KV groups, channels).

    Attributes:
        gates: puts gates on the units of a model; called with the model and ``checkpoint_activations``.
        each: number of units in a layer; None for units of width, of which the model's config says how many.
        spaces: class of the space of legal sets; for units of width, of the sets within one layer.
    """

    gates: Callable[[PreTrainedModel, bool], Gates]
    each: int | None
    spaces: type[Space] = AnyOf

    @property
    def wide(self) -> bool:
        """Whether units are KV groups or channels, of which each layer loses equally many."""
        return self.each is None

    def of(self, layers: Iterable[int]) -> list[int]:
        """Return the numbers of the units that make up some layers; empty for units of width."""
        each = self.each or 0
        return [each * layer + part for layer in layers for part in range(each)]

    def space(self, layers: int, width: int, remove: int, pinned: Iterable[int] = ()) -> Space:
        """Return the space of the masks that remove a given number of units.

        Args:
            layers: number of layers of the model.
            width: units of width in each layer; not read for other kinds.
            remove: how many go: units of each layer for units of width; else layers, or as many attentions
                and as many feed-forwards.
            pinned: layers that stay; not read for units of width.
        """
        if self.each is None:
            return InEach(layers, self.spaces(width, width - remove))
        return self.spaces(self.each * layers, self.each * (layers - remove), self.of(pinned))

    def gate(
        self, model: PreTrainedModel, checkpoint_activations: bool = False, limits: Constraints | None = None
    ) -> Gates:
        """Put gates on the units of a model, and return them, all open.

        Args:
            model: changed in place, until :meth:`src.models.gated.Gates.remove`.
            checkpoint_activations: recompute what runs in the backward pass instead of storing it.
            limits: what masks that are yet to be drawn will respect; each of them must be a model then.

        Raises:
            Misfit: the layers do not consist of such units, or some mask within the limits could not be cut.
        """
        gates = self.gates(model, checkpoint_activations)
        if limits is not None:
            gates.refuse(model, limits)
        return gates


KINDS: dict[Unit, Kind] = {
    "layer": Kind(GatedLayers, 1),
    "half": Kind(HalfGates, 2, Alternating),
    "kv_group": Kind(partial(WidthGates, "kv_group"), None),
    "channel": Kind(partial(WidthGates, "channel"), None),
}


def width_of(config: PretrainedConfig, unit: Unit) -> Width | None:
    """Return where the units of width lie in a model; None if ``unit`` is a layer or a half.

    Raises:
        Misfit: the layers do not hold such units in a way that can be cut.
    """
    return find_width(config, unit) if KINDS[unit].wide else None
