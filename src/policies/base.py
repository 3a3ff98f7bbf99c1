"""The contract of a mask policy: an ask-tell optimiser over which units to remove.

The search asks :meth:`MaskPolicy.sample` for a mask and runs the model under it. It tells the loss to
:meth:`MaskPolicy.surrogate` and, if the policy needs it, the gradient of the loss with respect to the gates.
The surrogate's value is differentiated with respect to the policy's own parameters. So pathwise,
score-function, greedy, random and training-free methods share one command, and the search names none of them.

A policy knows units (layers, or halves of layers) by their numbers alone. The *space* says which sets of them
are legal (:mod:`src.units.spaces`).

Shapes: D draws, U units (L layers where a method takes whole layers only).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from src.errors import ConfigError
from src.mask import WIDE, Unit
from src.policies.measuring import Probe
from src.ranges import Count, Seed, checked
from src.units.kinds import KINDS
from src.units.spaces import Kept, Space


class MaskPolicy(nn.Module, ABC):
    """Holds the counts and constraints, one logit for each unit, and uniform defaults.

    A subclass overrides what it needs; :meth:`sample` it must.

    Args:
        always_keep: layers that may not be removed, such as ``[0, -1]``; negative counts from the end.
        seed: seed of the policy's own draws.
        candidates: how many of the last distinct hardened masks compete on held-out rows; 1 is the plain
            answer of the method.
        polish: whether single swaps of a removed and a kept layer are tried on held-out rows.
    """

    works_on: ClassVar[tuple[Unit, ...]] = ("layer",)
    """Units for which the method makes sense."""

    needs_gradient = True
    """Whether :meth:`surrogate` wants the losses' gradients with respect to the gates."""

    any_count = False
    """Whether what is learned ranks the units for every count alike, so that one search serves several."""

    differentiates_weights = False
    """Whether :meth:`initialise` needs gradients of the weights from the probe."""

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

    def refuse(self, quantize: str | None, adapted: bool, in_parts: bool) -> None:
        """Refuse weights that this policy cannot learn from, before anything is loaded.

        Args:
            quantize: how they are quantised.
            adapted: whether adapters train beside them.
            in_parts: whether each rank holds a part of them.

        Raises:
            ConfigError: names the key and the alternative.
        """
        name = type(self).__name__
        if self.differentiates_weights and quantize:
            raise ConfigError(
                f"model.quantize: {name} differentiates the weights, which '{quantize}' does not allow. Set "
                f"it to null, or choose another policy."
            )
        if self.differentiates_weights and adapted:
            raise ConfigError(
                f"model.adapters: {name} scores the frozen weights by their gradients. Set it to null, or "
                f"choose another policy."
            )
        if self.differentiates_weights and in_parts:
            raise ConfigError(
                f"trainer.strategy: {name} differentiates the weights, which FSDP2 holds in parts. Use "
                f"configs/strategy/ddp.yaml, or choose another policy."
            )

    def setup(
        self, num_layers: int, remove: int, pinned: Iterable[int] = (), unit: Unit = "layer", width: int = 1
    ) -> None:
        """Take the sizes and create the parameters; the search calls this once, first of all.

        Args:
            num_layers: layers of the model.
            remove: layers to remove in the end; or as many halves as these have, or units of each layer.
            pinned: layers that this model cannot lose and still be exported.
            unit: what is removed.
            width: units in each layer, where these are parts of its width.

        Raises:
            ConfigError: the count and the constraints cannot both be met, or the method is for other units.
        """
        if unit not in self.works_on:
            raise ConfigError(
                f"model.unit: '{unit}' with {type(self).__name__}, which chooses among other units. Set it "
                f"to {' or '.join(self.works_on)}, or choose another policy, such as "
                f"src.policies.GumbelTopK."
            )
        self.kind, self.num_layers, self.width = KINDS[unit], num_layers, width
        self.pinned = self._kept_layers(pinned)
        every = width if self.kind.wide else num_layers
        most = min(every - 1, every - len(self.pinned))
        if not 0 < remove <= most:
            what = f"{WIDE[unit]} of each layer" if unit in WIDE else "layers"
            raise ConfigError(
                f"remove: {remove} {what} asked, but the model has {every}, of which "
                f"{every - len(self.pinned)} may be removed. Accepted: 1 to {most}."
            )
        if self.polish and unit == "channel":
            raise ConfigError(
                "policy.polish: it measures masks that differ in one unit, and of channels these are too "
                "many. Set it to false."
            )
        self.target, self.remove, self.held = remove, remove, frozenset[int]()
        self.space = self.spare(remove)
        self.units = self.space.units
        self.free = [u for u in range(self.units) if u not in self.space.pinned]
        self.logits = nn.Parameter(torch.zeros(self.units))

    def _kept_layers(self, pinned: Iterable[int]) -> frozenset[int]:
        """The layers that stay, of those that a mask may remove."""
        if self.kind.wide and self.always_keep:
            raise ConfigError(
                f"policy.always_keep: {list(self.always_keep)} are layers, and model.unit removes as many "
                f"units from each layer. Set it to []."
            )
        wrong = [i for i in self.always_keep if not -self.num_layers <= i < self.num_layers]
        if wrong:
            raise ConfigError(
                f"policy.always_keep: {wrong} outside 0..{self.num_layers - 1} (model of {self.num_layers} "
                f"layers)."
            )
        return frozenset({i % self.num_layers for i in self.always_keep} | set(pinned))

    def spare(self, remove: int) -> Space:
        """Return the space of masks without so many layers, halves of so many, or units of each layer."""
        return self.kind.space(self.num_layers, self.width, remove, self.pinned).holding(self.held)

    @contextmanager
    def aimed(self, remove: int, held: Iterable[int] = ()) -> Iterator[None]:
        """Draw and harden masks of a smaller count within the block.

        Args:
            remove: how many to remove in the end, at most those of :meth:`setup`. While a curriculum has come
                to fewer, a draw removes these.
            held: units that stay besides the pinned.
        """
        before = self.target, self.remove, self.held, self.space
        self.target, self.remove, self.held = remove, min(remove, self.remove), frozenset(held)
        self.space = self.spare(remove)
        try:
            yield
        finally:
            self.target, self.remove, self.held, self.space = before

    @property
    def closed(self) -> int:
        """Number of units that a mask removes at present."""
        return self.units - self.spare(self.remove).keep

    def by_group(self, free: Tensor) -> Tensor:
        """Return values of the free units ``[G, F]``, a row for each group of them that is chosen apart."""
        return free.view(self.space.groups, -1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskPolicy:
        """Follow the trainer to its device, not to half precision, which loses small steps of logits."""
        apply = cast(Callable[..., "MaskPolicy"], super()._apply)
        return apply(lambda tensor: fn(tensor).to(tensor.dtype), recurse)

    def initialise(self, probe: Probe) -> None:
        """Prepare from calibration rows, before the first step of a new search."""

    @abstractmethod
    def sample(self, step: int, draw: int) -> Tensor:
        """Draw a mask: gates ``[U]``, exactly 0 or 1, exactly ``self.closed`` zeros.

        A method whose gates are relaxed by definition may return values in [0, 1] instead.
        A pure function of the parameters, (seed, step, draw) and the schedules, hence equal on all ranks.
        The result may carry a relaxed gradient to the parameters.
        """

    def surrogate(self, gates_DL: Tensor, losses_D: Tensor, grads_DL: Tensor | None) -> Tensor:
        """Take the outcome of the draws; return a scalar whose gradient drives the parameters.

        The default is the pathwise one: its gradient is that of the mean loss, by the chain rule through
        ``gates_DL``. A method without gradients records the losses and returns ``self.nothing()``.

        Args:
            gates_DL: the draws as sampled ``[D, U]``, with their graph.
            losses_D: loss of each draw, detached.
            grads_DL: gradient of each loss with respect to its gates, detached.
        """
        assert grads_DL is not None
        return (gates_DL * grads_DL).sum(-1).mean()

    def nothing(self) -> Tensor:
        """Return a zero attached to the parameters, for a policy that does not learn by gradient."""
        return self.logits.sum() * 0.0

    def harden(self) -> Kept:
        """Return the kept units, a set of the space: by default that of the highest logits."""
        return tuple(self.space.argmax(self.logits.detach()).nonzero().flatten().tolist())

    def keep_probabilities(self) -> Tensor:
        """Return the probability ``[U]`` of keeping each unit, for pictures and the entropy of the mask."""
        keep = torch.zeros(self.units)
        keep[list(self.harden())] = 1.0
        return keep

    def worth(self) -> list[float]:
        """Return how much each unit is worth keeping, by which the polish orders swaps: here the logits."""
        return self.logits.tolist()

    def gates(self, kept: Iterable[int]) -> Tensor:
        """Return the gates ``[U]`` of a set of kept units."""
        gates = torch.zeros(self.units, device=self.logits.device)
        gates[list(kept)] = 1.0
        return gates

    def generator(self, step: int, draw: int) -> torch.Generator:
        """Return a generator that depends on (seed, step, draw) only."""
        return torch.Generator().manual_seed(((self.seed * 1_000_003 + step) * 10_007 + draw) % 2**63)
