"""What a policy may ask of the model that it chooses units of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol

from torch import Tensor, nn

Measure = Literal["divergence", "cross_entropy"]
"""What a probe measures of a mask."""


class Probe(Protocol):
    """Measures a model for a policy on fixed calibration rows, before and after the search.

    Values are means over the rows of all ranks, hence equal on all ranks.
    """

    def divergence(self, gates_L: Tensor, quick: bool = False) -> float:
        """Return the mean KL (nats per token) from the teacher to the model under ``gates_L``.

        A quick measurement uses a part of the rows.
        """

    def cross_entropy(self, gates_L: Tensor) -> float:
        """Return the mean cross-entropy (nats per supervised token) under ``gates_L`` on the labels."""

    def walk(
        self, masks: Sequence[Tensor], about: str, by: Measure = "divergence", quick: bool = False
    ) -> list[float]:
        """Measure many masks, in whatever order is cheapest, and show how far that is.

        Args:
            masks: gates ``[U]`` of each.
            about: names the step.
            by: what is measured.
            quick: whether a part of the rows is enough.

        Returns:
            The values, in the order of ``masks``.
        """
        if by == "cross_entropy":
            return [self.cross_entropy(gates_L) for gates_L in masks]
        return [self.divergence(gates_L, quick) for gates_L in masks]

    def states(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the open model's residual stream, a batch at a time: ``(h_JBTH, real_BT)``.

        J = L + 1: ``h[l]`` enters layer l, and ``h[L]`` leaves the last layer, before the final norm.
        ``real`` is false at padding.
        """

    def mean(self, sums: Tensor, counts: Tensor) -> Tensor:
        """Return ``sums / counts``, both added up over the ranks first."""

    def salience(self) -> Tensor:
        """Return ``|gate dCE/dgate|`` ``[U]`` at open gates, the mean over the batches of rows."""

    def activations(self) -> Tensor:
        """Return the mean absolute input ``[U]`` of the map that writes width units to the stream."""

    def weights(self) -> Iterator[tuple[int, str, nn.Parameter]]:
        """Give the weights of the layers, each with its layer and its name inside it."""

    def share(self, layer: int, name: str, values: Tensor) -> Tensor:
        """Return the sums ``[U / L]`` of values at the entries of a weight over the units of its layer."""

    def gradients(self, visit: Callable[[int, nn.Module], None]) -> None:
        """Differentiate the mean cross-entropy of the open model with respect to the layers' weights.

        It calls ``visit(layer, module)`` for each layer, with the gradient in its parameters' ``grad``.
        """
