"""The contract of a mask policy: an ask-tell optimiser over which units to remove.

The search asks :meth:`MaskPolicy.sample` for a mask, runs the model under it, and tells the loss to
:meth:`MaskPolicy.surrogate`; with it, if the policy needs that, the gradient of the loss with respect to the
gates. The surrogate's value is differentiated with respect to the policy's own parameters. So pathwise,
score-function, greedy, random and training-free methods share one command, and the search names none of them.

A policy knows units (layers, halves of layers, or parts of their width) by their numbers alone. The *space*
says which sets of them are legal (:mod:`src.units.spaces`). At the end the policy *hardens*: it names the set
of units to keep.

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
    """The base of all policies: holds the space of legal masks and one logit for each unit.

    A subclass overrides what it needs; :meth:`sample` it must.

    Args:
        always_keep: layers that may not be removed, such as ``[0, -1]``; negative counts from the end.
        seed: seed of the policy's own draws.
        candidates: number of masks, the last distinct ones that :meth:`harden` gave in training, of which the
            best on held-out rows becomes the final one, or the first mask if that is better; 1 is the plain
            answer of the method.
        polish: whether exchanges of a removed and a kept unit are tried on held-out rows for as long as they
            help.
    """

    works_on: ClassVar[tuple[Unit, ...]] = ("layer",)
    """Kinds of unit for which the method makes sense."""

    needs_gradient = True
    """Whether :meth:`surrogate` wants the losses' gradients with respect to the gates."""

    any_count = False
    """Whether what is learned ranks the units for any count, so that one search serves several counts."""

    differentiates_weights = False
    """Whether :meth:`initialise` needs gradients of the weights from the probe."""

    temperature: float = 1.0
    """Temperature of the relaxation, for a policy that has one; a callback may anneal it."""

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
            quantize: type to which the weights are quantised; None if they are not.
            adapted: whether adapters train beside the weights.
            in_parts: whether each rank holds only a part of the weights.

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
        """Create the space and the parameters for a model's sizes; the search calls this once, first of all.

        Args:
            num_layers: number of layers of the model.
            remove: how many layers to remove in the end. Of halves as many attentions and as many
                feed-forwards go, of KV groups or channels as many from each layer.
            pinned: layers that this model cannot lose and still be exported.
            unit: kind of the units.
            width: units in each layer, for KV groups or channels.

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
        """Return the layers that every mask keeps: those of ``always_keep``, and those the model cannot lose.

        Raises:
            ConfigError: ``always_keep`` names a layer that is none, or units of width are removed.
        """
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
        """Return the space of the masks that remove ``remove`` layers (or halves, or units; as in setup)."""
        return self.kind.space(self.num_layers, self.width, remove, self.pinned).holding(self.held)

    @contextmanager
    def aimed(self, remove: int, held: Iterable[int] = ()) -> Iterator[None]:
        """Aim at a smaller removal in the block: draws and hardened masks are then of that size.

        Args:
            remove: how many to remove in the end, at most those of :meth:`setup`. While a curriculum has not
                yet come to so many, a draw removes as many as the curriculum says.
            held: units that stay besides those that always do.
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
        """Arrange values of the free units (those that may be removed) in a row for each group of units.

        The units of a group are chosen independently of those of others. The KV groups or channels of a
        layer form a group; all layers, or all halves, form one.

        Args:
            free: one value for each free unit.

        Returns:
            ``[G, F]``: G groups, F free units in each.
        """
        return free.view(self.space.groups, -1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskPolicy:
        """Move to the trainer's device, but not to half precision, which loses small steps of logits."""
        apply = cast(Callable[..., "MaskPolicy"], super()._apply)
        return apply(lambda tensor: fn(tensor).to(tensor.dtype), recurse)

    def initialise(self, probe: Probe) -> None:
        """Set the start of the parameters from calibration rows, before the first step of a new search."""

    @abstractmethod
    def sample(self, step: int, draw: int) -> Tensor:
        """Draw a mask: gates ``[U]``, exactly 0 or 1, exactly ``self.closed`` zeros.

        A method whose gates are relaxed by definition may return values in [0, 1] instead. The draw depends
        on nothing but the parameters, (seed, step, draw) and the schedules, so all ranks draw the same. The
        result may carry a relaxed gradient to the parameters.

        Args:
            step: number of the training step.
            draw: number of the draw within the step.
        """

    def surrogate(self, gates_DL: Tensor, losses_D: Tensor, grads_DL: Tensor | None) -> Tensor:
        """Take the outcome of a step's draws; return a scalar whose gradient drives the parameters.

        The default is the pathwise one: its gradient is that of the mean loss, by the chain rule through
        ``gates_DL``. A method without gradients records the losses and returns :meth:`nothing`.

        Args:
            gates_DL: the draws as sampled ``[D, U]``, with their graph.
            losses_D: loss of each draw, detached.
            grads_DL: gradient ``[D, U]`` of each loss with respect to its gates, detached; None unless
                ``needs_gradient``.
        """
        assert grads_DL is not None
        return (gates_DL * grads_DL).sum(-1).mean()

    def nothing(self) -> Tensor:
        """Return a zero attached to the parameters, for a policy that does not learn by gradient."""
        return self.logits.sum() * 0.0

    def harden(self) -> Kept:
        """Return the units that the final mask keeps, a legal set: by default that of the highest logits."""
        return tuple(self.space.argmax(self.logits.detach()).nonzero().flatten().tolist())

    def keep_probabilities(self) -> Tensor:
        """Return the probability ``[U]`` that each unit is kept, for plots and the entropy of the mask."""
        keep = torch.zeros(self.units)
        keep[list(self.harden())] = 1.0
        return keep

    def worth(self) -> list[float]:
        """Return how much each of the U units is worth keeping: by default its logit.

        Starts of the polish and a race are found by it.
        """
        return self.logits.tolist()

    def gates(self, kept: Iterable[int]) -> Tensor:
        """Return the gates ``[U]`` of a set of kept units."""
        gates = torch.zeros(self.units, device=self.logits.device)
        gates[list(kept)] = 1.0
        return gates

    def generator(self, step: int, draw: int) -> torch.Generator:
        """Return a generator that depends on (seed, step, draw) only."""
        return torch.Generator().manual_seed(((self.seed * 1_000_003 + step) * 10_007 + draw) % 2**63)
