"""The contract of a mask policy: an ask-tell optimiser over which layers to remove.

The search asks with :meth:`MaskPolicy.sample`, runs the model under the mask, and tells the losses (and,
for a policy that wants them, their gradients with respect to the gates) to :meth:`MaskPolicy.surrogate`,
whose value is differentiated with respect to the policy's own parameters. So pathwise, score-function,
greedy, random and training-free methods are the same command, and the search knows none of them by name.

Shapes: D draws, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from src.errors import ConfigError
from src.ranges import Count, Seed, checked


class Probe(Protocol):
    """What a policy may measure on the calibration rows before and after the search.

    Numbers are means over the rows of all ranks, hence equal on all ranks.
    """

    def divergence(self, gates_L: Tensor, quick: bool = False) -> float:
        """Mean KL (nats per token) from the teacher to the model under ``gates_L``.

        A quick measurement uses a part of the rows.
        """

    def cross_entropy(self, gates_L: Tensor) -> float:
        """Mean cross-entropy (nats per supervised token) of the model under ``gates_L`` on the labels."""

    def states(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The open model's residual stream, a batch at a time: ``(h_JBTH, real_BT)``.

        J = L + 1: ``h[l]`` enters layer l, and ``h[L]`` leaves the last layer, before the final norm.
        ``real`` is false at padding.
        """

    def mean(self, sums: Tensor, counts: Tensor) -> Tensor:
        """``sums / counts``, both added up over the ranks first."""

    def gradients(self, visit: Callable[[int, nn.Module], None]) -> None:
        """Differentiate the mean cross-entropy of the open model with respect to the layers' weights.

        ``visit(layer, module)`` is called for each layer with the gradient in its parameters' ``grad``.
        """


class MaskPolicy(nn.Module):
    """Base class: holds the counts and constraints, one logit for each layer, and uniform defaults.

    A subclass overrides what it needs; :meth:`sample` it must.

    Args:
        always_keep: layers that may not be removed, such as ``[0, -1]``; negative counts from the end.
        seed: seed of the policy's own draws.
        candidates: how many of the last distinct hardened masks compete on held-out rows; 1 is the plain
            answer of the method.
        polish: whether single swaps of a removed and a kept layer are tried on held-out rows.
    """

    needs_gradient = True
    """Whether :meth:`surrogate` wants the losses' gradients with respect to the gates."""

    differentiates_weights = False
    """Whether :meth:`initialise` asks the probe for gradients of the weights."""

    temperature: float = 1.0
    """Of a relaxation, for a policy that has one; a callback may anneal it."""

    logits: nn.Parameter

    @checked
    def __init__(
        self,
        always_keep: Iterable[int] = (),
        seed: Seed = 0,
        candidates: Count = 1,
        polish: bool = False,
    ) -> None:
        super().__init__()
        self.always_keep, self.seed = tuple(always_keep), seed
        self.candidates, self.polish = candidates, polish

    def setup(self, num_layers: int, remove: int, pinned: Iterable[int] = ()) -> None:
        """Learn the sizes and create the parameters. Called once, before anything else.

        Args:
            num_layers: layers of the model.
            remove: layers to remove in the end.
            pinned: layers that this model cannot lose and still be exported.

        Raises:
            ConfigError: the count and the constraints cannot both be met.
        """
        wrong = [i for i in self.always_keep if not -num_layers <= i < num_layers]
        if wrong:
            raise ConfigError(
                f"policy.always_keep: {wrong} outside 0..{num_layers - 1} (model of {num_layers} layers)."
            )
        kept = {i % num_layers for i in self.always_keep} | set(pinned)
        self.free = [i for i in range(num_layers) if i not in kept]
        if not 0 < remove < num_layers or remove > len(self.free):
            raise ConfigError(
                f"remove: {remove} layers asked, but the model has {num_layers} layers, of which "
                f"{len(self.free)} may be removed. Accepted: 1 to {min(num_layers - 1, len(self.free))}."
            )
        self.num_layers, self.target, self.remove = num_layers, remove, remove
        self.logits = nn.Parameter(torch.zeros(num_layers))

    def initialise(self, probe: Probe) -> None:
        """Prepare from calibration rows, before the first step of a new search."""

    def sample(self, step: int, draw: int) -> Tensor:
        """Ask for a mask: gates ``[L]``, exactly 0 or 1, exactly ``self.remove`` zeros.

        A method whose gates are relaxed by definition may return values in [0, 1] instead.
        A pure function of the parameters, (seed, step, draw) and the schedules, hence equal on all ranks.
        The result may carry a relaxed gradient to the parameters.
        """
        raise NotImplementedError

    def surrogate(self, gates_DL: Tensor, losses_D: Tensor, grads_DL: Tensor | None) -> Tensor:
        """Tell the outcome of the draws: a scalar whose gradient drives the parameters.

        The default is the pathwise one: its gradient is that of the mean loss, by the chain rule through
        ``gates_DL``. A method without gradients records the losses and returns ``self.nothing()``.

        Args:
            gates_DL: the draws as sampled, with their graph.
            losses_D: loss of each draw, detached.
            grads_DL: gradient of each loss with respect to its gates, detached.
        """
        assert grads_DL is not None
        return (gates_DL * grads_DL).sum(-1).mean()

    def nothing(self) -> Tensor:
        """A zero attached to the parameters, for a policy that is not learned by gradient."""
        return self.logits.sum() * 0.0

    def harden(self) -> tuple[int, ...]:
        """The kept layers, exactly ``num_layers - target`` of them: here those of the highest logits."""
        values = self.logits.detach().tolist()
        ranked = sorted(self.free, key=values.__getitem__)
        gone = set(ranked[: self.target])
        return tuple(i for i in range(self.num_layers) if i not in gone)

    def keep_probabilities(self) -> Tensor:
        """Belief ``[L]`` that each layer is kept, for pictures and the entropy of the mask."""
        keep = torch.zeros(self.num_layers)
        keep[list(self.harden())] = 1.0
        return keep

    def gates(self, keep: Iterable[int]) -> Tensor:
        """The gates ``[L]`` of a set of kept layers."""
        gates = torch.zeros(self.num_layers, device=self.logits.device)
        gates[list(keep)] = 1.0
        return gates

    def generator(self, step: int, draw: int) -> torch.Generator:
        """A generator that depends on (seed, step, draw) only."""
        return torch.Generator().manual_seed(((self.seed * 1_000_003 + step) * 10_007 + draw) % 2**63)
