"""What a policy may ask about the model whose units it chooses: losses under masks, states, gradients."""

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
        """Return the mean KL (nats per token) from the teacher to the model under gates ``[U]``.

        Args:
            gates_L: one gate for each unit.
            quick: use only a part of the rows.
        """

    def cross_entropy(self, gates_L: Tensor) -> float:
        """Return the mean cross-entropy (nats per supervised token) on the labels under gates ``[U]``."""

    def walk(
        self, masks: Sequence[Tensor], about: str, by: Measure = "divergence", quick: bool = False
    ) -> list[float]:
        """Measure many masks, in whatever order is cheapest, and show the progress.

        Args:
            masks: gates ``[U]`` of each.
            about: name under which the progress is shown, such as ``all masks``.
            by: what is measured.
            quick: whether a part of the rows is enough.

        Returns:
            The values, in the order of ``masks``.
        """
        if by == "cross_entropy":
            return [self.cross_entropy(gates_L) for gates_L in masks]
        return [self.divergence(gates_L, quick) for gates_L in masks]

    def states(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the open model's residual stream at all depths, a batch at a time.

        Yields:
            ``h_JBTH`` and ``real_BT``. J = L + 1: ``h[l]`` enters layer l, and ``h[L]`` leaves the last
            layer, before the final norm. ``real`` is false at padding.
        """

    def finals(self, gates_L: Tensor | None) -> Iterator[Tensor]:
        """Yield the final hidden states ``[N, H]`` at supervised positions, a batch of this rank at a time.

        Args:
            gates_L: gates ``[U]``; None is all open.
        """

    def mean(self, sums: Tensor, counts: Tensor) -> Tensor:
        """Return ``sums / counts`` after each is added up over the ranks; ``counts`` may be a scalar."""

    def gate_gradients(self) -> Tensor:
        """Return the gradient ``[B, U]`` of the mean cross-entropy of each of B batches at open gates.

        A batch is that of all ranks together. Float64.
        """

    def activations(self) -> Tensor:
        """Return the absolute input of the output projections by KV group or channel, ``[U]``.

        It is summed over the inputs of a unit, and is the mean over the tokens.
        """

    def weights(self) -> Iterator[tuple[int, str, nn.Parameter]]:
        """Yield each weight of the layers with the number of its layer and its name inside it."""

    def share(self, layer: int, name: str, values: Tensor) -> Tensor:
        """Return the sum of values over the entries of a weight that belong to each unit of its layer.

        Args:
            layer: number of the layer.
            name: of the weight, inside the layer.
            values: one for each entry of the weight, of its shape.

        Returns:
            ``[U / L]``.
        """

    def gradients(self, visit: Callable[[int, nn.Module], None]) -> None:
        """Differentiate the mean cross-entropy of the open model with respect to the layers' weights.

        Args:
            visit: called as ``visit(layer, module)`` for each layer, with the gradient in its parameters'
                ``grad``.
        """
