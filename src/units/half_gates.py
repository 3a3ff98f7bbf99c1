"""Gates on the halves of layers: each multiplies what its attention or feed-forward adds to the stream.

A half whose gate is exactly zero is evaluated without autograd, because only its output matters to the gate's
gradient. Where nothing is differentiated and no cache is filled, it does not run at all.

Shapes: L layers, U = 2 L halves in order of computation.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from src.models.constraints import Constraints
from src.models.gated import Gates
from src.models.layers import alone, decoder_layers, fills_cache, first, stream_in, with_first
from src.units.halves import find_halves
from src.units.recombined import try_pairs

Forward = Callable[..., Any]


class HalfGates(Gates):
    """Puts gates on the halves of all layers of ``model``; they are open until :meth:`use` closes some.

    Modules keep their class, attributes and state-dict keys: only the bound ``forward`` of some is replaced,
    and :meth:`remove` restores it.

    Args:
        model: a decoder whose layers consist of an attention and a feed-forward, one after the other.
        checkpoint_activations: recompute open halves in the backward pass instead of storing them.

    Attributes:
        halves: for each layer, which of its modules belong to which half.
        evaluated: layers run so far, with 0.5 for a half.

    Raises:
        Misfit: the layers do not consist of two halves.
    """

    each = 2

    def __init__(self, model: PreTrainedModel, checkpoint_activations: bool = False) -> None:
        super().__init__()
        self.path, self.layers = decoder_layers(model)
        self.checkpoint_activations = checkpoint_activations
        self.halves = find_halves(model)
        self._caching = False
        self._alone: int | None = None
        self._restore = ExitStack()
        for index, (layer, halves) in enumerate(zip(self.layers, self.halves, strict=True)):
            layer.forward = self._layer(index, layer.forward)
            self._restore.callback(delattr, layer, "forward")
            for path in dict.fromkeys((*halves.idle, *halves.writers)):
                unit, module = 2 * index + halves.half[path], layer.get_submodule(path)
                forward: Forward = module.forward
                if path in halves.idle:
                    forward = self._idle(unit, forward)
                if path in halves.writers:
                    forward = self._gated(unit, forward)
                module.forward = forward
                self._restore.callback(delattr, module, "forward")

    def refuse(self, model: PreTrainedModel, limits: Constraints) -> None:
        try_pairs(model, self.halves, limits)

    def share(self, layer: int, name: str, values: Tensor) -> Tensor:
        half, shares = self.halves[layer].of(name), values.new_zeros(2)
        if half is not None:
            shares[half] = values.sum()
        return shares

    def remove(self) -> None:
        """Give the modules their own ``forward`` back."""
        self._restore.close()

    def _layer(self, index: int, forward: Forward) -> Forward:
        """Return a forward for a layer, which runs one half at a time if streams in front of halves are kept.

        While one half runs alone, the other adds nothing. Else it is the layer's own forward.
        """

        def layer(*args: Any, **kwargs: Any) -> Any:
            self._caching = fills_cache(args, kwargs)
            if self._prefixes is None:
                out = forward(*args, **kwargs)
            else:
                out = self._in_turn(index, half, (args, kwargs))
            if self._observer is not None:
                self._observer(index, stream_in(args, kwargs), first(out))
            self.plain = isinstance(out, Tensor)
            return out

        def half(unit: int, *args: Any, **kwargs: Any) -> Any:
            if self._stride == self.each:
                return forward(*args, **kwargs)
            if self._values and self._values[unit] == 0.0:
                return stream_in(args, kwargs)
            self._alone = unit
            try:
                return forward(*args, **kwargs)
            finally:
                self._alone = None

        return layer

    def _closed(self, unit: int) -> bool:
        """Return whether a half adds nothing: its gate is zero, or the other half runs alone."""
        return self._alone not in (None, unit) or (self._gates is not None and self._values[unit] == 0.0)

    def _rests(self, unit: int) -> bool:
        """Return whether a half need not run: it is closed, nothing is differentiated, no cache is filled."""
        return self._closed(unit) and not torch.is_grad_enabled() and not self._caching

    def _gated(self, unit: int, forward: Forward) -> Forward:
        """Return a forward that multiplies the output of a writer, which goes to the stream, by its gate."""

        def gated(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            self.evaluated += 0.0 if self._rests(unit) else 0.5
            if self._alone not in (None, unit):
                return with_first(out, torch.zeros_like(first(out)))
            if self._gates is None or (self._values[unit] == 1.0 and not self._gates.requires_grad):
                return out
            return with_first(out, first(out) * self._gate(unit, first(out)))

        return gated

    def _idle(self, unit: int, forward: Forward) -> Forward:
        """Return a forward for a module that serves one half alone, and has no use while that half is closed.

        Then the module runs without autograd; and where nothing is differentiated and no cache is filled, it
        does not run: zeros of its output's shape take the place. A module always runs if it gives more than
        one tensor, such as a state that its layer keeps, or one of another number of streams than its input.
        """
        form: list[Any] = []  # an output, without tokens, and its width if that is not the input's

        def idle(*args: Any, **kwargs: Any) -> Any:
            h = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
            if form and self._rests(unit):
                empty, width = form
                shape = h.shape if width is None else (*h.shape[:-1], width)
                return with_first(empty, h.new_zeros(shape, dtype=first(empty).dtype))
            if self.checkpoint_activations and torch.is_grad_enabled() and not self._closed(unit):
                return checkpoint(forward, *args, use_reentrant=False, **kwargs)
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self._closed(unit)):
                out = forward(*args, **kwargs)
            if not form and alone(out) and first(out).shape[:-1] == h.shape[:-1]:
                width = None if first(out).shape == h.shape else first(out).shape[-1]
                form.extend((with_first(out, first(out).new_empty(0)), width))
            return out

        return idle
