"""The kinds of unit by name, each with its number in a layer, its space and its gates."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from transformers import PreTrainedModel

from src.mask import Unit
from src.models.gated import GatedLayers, Gates
from src.units.half_gates import HalfGates
from src.units.spaces import Alternating, AnyOf, Space


@dataclass(frozen=True)
class Kind:
    """A kind of unit.

    Attributes:
        each: number of units in a layer.
        spaces: class of the space of legal sets.
        gates: puts gates on the units of a model.
    """

    each: int
    spaces: type[Space]
    gates: Callable[[PreTrainedModel, bool], Gates]

    def space(self, layers: int, keep: int, pinned: Iterable[int] = ()) -> Space:
        """Return the space of sets of as many units as ``keep`` layers have, the ``pinned`` among them."""
        return self.spaces(self.each * layers, self.each * keep, self.of(pinned))

    def of(self, layers: Iterable[int]) -> list[int]:
        """Return the units of some layers."""
        return [self.each * layer + part for layer in layers for part in range(self.each)]

    def gate(self, model: PreTrainedModel, checkpoint_activations: bool = False) -> Gates:
        """Put gates on the units of a model, all open."""
        return self.gates(model, checkpoint_activations)


KINDS: dict[Unit, Kind] = {"layer": Kind(1, AnyOf, GatedLayers), "half": Kind(2, Alternating, HalfGates)}
