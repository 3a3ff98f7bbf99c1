"""The gated student: every decoder layer of a model behind a gate that can be learned.

With layer ``F_l`` and gate ``g_l`` the residual stream becomes ``h' = lerp(h, F_l(h), g_l)``. ``lerp`` is
exact at both ends, so open gates are the teacher and hard gates are the physically cut model, to the last
bit (``h + g * (F(h) - h)`` is not).

A layer whose gate is exactly zero must still be evaluated, because its output is what the gate's gradient
``<dLoss/dh', F(h) - h>`` needs. But the chain through its weights is multiplied by that zero, so it runs
without autograd: the same gradients, without its share of the backward pass and of the activations. Where
nothing is differentiated, it does not run at all.

Shapes: B batch, T tokens, H hidden, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from src.errors import ConfigError
from src.models.constraints import Constraints
from src.models.layers import (
    Arguments,
    decoder_layers,
    fills_cache,
    first,
    stream_in,
    with_first,
    with_stream,
)
from src.models.mixing import mix
from src.models.prefixes import Prefixes

Observer = Callable[[int, Tensor, Tensor], None]
"""Called as ``observer(layer, h_in_BTH, h_out_BTH)`` after each layer."""


class Gates:
    """Holds the gates of a model's units while it runs; a subclass attaches them to the model.

    Attributes:
        layers: the decoder layers.
        each: number of units in a layer.
        evaluated: number of runs of single layers so far, which measures the cost of a search.
        plain: whether the layers return the stream alone, as a tensor; known once the open model has run.
    """

    each: int
    layers: nn.ModuleList

    def __init__(self) -> None:
        self.evaluated = 0.0
        self._gates: Tensor | None = None
        self._values: list[float] = []
        self._observer: Observer | None = None
        self._remembered: Prefixes | None = None
        self._prefixes: Prefixes | None = None
        self.plain = False

    def __len__(self) -> int:
        return self.each * len(self.layers)

    def remove(self) -> None:
        """Give the modules their own ``forward`` back."""
        raise NotImplementedError

    def refuse(self, model: PreTrainedModel, limits: Constraints) -> None:
        """Refuse a model of which a legal mask could not be cut.

        Args:
            model: to which the gates are attached.
            limits: which of its layers stay.

        Raises:
            Misfit: the message gives the reason.
        """

    def share(self, layer: int, name: str, values: Tensor) -> Tensor:
        """Return the sum of values over the entries of a weight that belong to each unit of its layer.

        Args:
            layer: number of the layer.
            name: of the weight, inside the layer.
            values: one for each entry of the weight, of its shape.

        Returns:
            ``[U / L]``, one sum for each unit of the layer; zeros where the weight belongs to none.
        """
        raise NotImplementedError

    def watched(self, see: Callable[[int, Tensor], None]) -> AbstractContextManager[None]:
        """Call ``see(layer, input)``, in the block, whenever a linear map runs that units of width feed.

        Only gates on units of width (KV groups, channels) have such maps.

        Args:
            see: takes the number of the layer and the map's input ``[B, T, features]``.
        """
        raise NotImplementedError

    @contextmanager
    def use(self, gates_U: Tensor | None, observer: Observer | None = None) -> Iterator[None]:
        """Apply gates, within the block, to every pass of the model.

        Args:
            gates_U: values in [0, 1], one for each unit; or ``[B, U]``, such a row for each row of the batch;
                None leaves all open.
            observer: called as ``observer(layer, h_in_BTH, h_out_BTH)`` after each layer, with its number and
                the stream before and after it. A gate on the whole layer is not applied yet.
        """
        assert gates_U is None or gates_U.shape[-1] == len(self), "one gate for each unit"
        before = self._gates, self._values, self._observer, self._prefixes
        self._gates, self._observer = gates_U, observer
        # Of rows the mean: exactly 0 for a unit that is closed in all of them, 1 for one that is open in all.
        self._values = [] if gates_U is None else gates_U.reshape(-1, len(self)).mean(0).tolist()
        self._prefixes = self._remembered if observer is None else None
        if self._prefixes is not None:
            self._prefixes.begin(self._values or [1.0] * len(self))
        try:
            yield
        finally:
            self._gates, self._values, self._observer, self._prefixes = before

    def _gate(self, unit: int | slice, x: Tensor) -> Tensor:
        """Return the gate of a unit, or those of several, as a factor of ``x [B, T, ...]``.

        Raises:
            ConfigError: the rows have gates of their own, and ``x`` has lost its rows.
        """
        assert self._gates is not None
        gates = self._gates[..., unit].to(x.dtype)
        if self._gates.ndim == 1:
            return gates
        if x.ndim != 3 or len(x) != len(gates):
            raise ConfigError(
                f"model.unit: a module of this family takes all rows as one, {tuple(x.shape)}, so each "
                "cannot have a mask of its own. Set it to layer, or choose a policy of one mask."
            )
        return gates[:, None, None] if gates.ndim == 1 else gates[:, None]

    @contextmanager
    def remember(self, prefixes: Prefixes | None) -> Iterator[None]:
        """Let each pass in the block start behind the units that an earlier pass ran with the same gates.

        The passes are of one batch, and under :meth:`use`. The layers must hand on the stream alone
        (:func:`src.models.midway.resumes`). A pass with an observer runs every layer.

        Args:
            prefixes: keeps the streams of earlier passes, and those of these passes; None remembers nothing.
        """
        before, self._remembered = self._remembered, prefixes
        try:
            yield
        finally:
            self._remembered = before

    def _in_turn(self, index: int, run: Callable[..., Any], arguments: Arguments) -> Tensor:
        """Run the units of a layer in turn, each from the remembered stream if there is one; return the last.

        Args:
            index: the layer.
            run: runs one unit of it alone; called with the unit and the layer's arguments.
            arguments: the layer's; their stream has no meaning where the pass begins behind this layer.

        Returns:
            The stream ``[B, T, H]`` behind the layer.
        """
        assert self._prefixes is not None, "there is something to begin at"
        h_BTH = stream_in(*arguments)
        for unit in range(self.each * index, self.each * (index + 1), self._stride):
            if unit >= self._prefixes.start:
                args, kwargs = with_stream(self._prefixes.stream(unit, h_BTH), *arguments)
                with torch.set_grad_enabled(torch.is_grad_enabled() or unit < self._prefixes.graded):
                    h_BTH = first(run(unit, *args, **kwargs))
        return h_BTH

    @property
    def _stride(self) -> int:
        """Units that run at a time: a whole layer where streams are kept in front of layers alone."""
        assert self._prefixes is not None, "there is something to begin at"
        return self.each if (self._prefixes.every or 1) % self.each == 0 else 1


class GatedLayers(Gates):
    """Puts gates on the decoder layers of ``model``; they are open until :meth:`use` closes some.

    The layers keep their class, attributes and state-dict keys: only their bound ``forward`` is replaced,
    and :meth:`remove` restores it.

    Args:
        model: any decoder; its one list of layers is found by length.
        checkpoint_activations: recompute kept layers in the backward pass instead of storing them.
        lean: evaluate hard-zero layers without autograd, and multiply by no gate of 0 or 1 (the default; off
            only to compare).
    """

    each = 1

    def __init__(
        self,
        model: PreTrainedModel,
        checkpoint_activations: bool = False,
        lean: bool = True,
    ) -> None:
        super().__init__()
        self.path, self.layers = decoder_layers(model)
        self.checkpoint_activations = checkpoint_activations
        self.lean = lean
        for index, layer in enumerate(self.layers):
            layer.forward = self._gated_forward(index, layer.forward)

    def share(self, layer: int, name: str, values: Tensor) -> Tensor:
        return values.sum()[None]

    def remove(self) -> None:
        """Give the layers their own ``forward`` back."""
        for layer in self.layers:
            del layer.forward

    def _gated_forward(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def gated(*args: Any, **kwargs: Any) -> Any:
            if self._prefixes is not None:
                return self._in_turn(index, step, (args, kwargs))
            return step(index, *args, **kwargs)

        def step(index: int, *args: Any, **kwargs: Any) -> Any:
            gates, h_in = self._gates, stream_in(args, kwargs)
            if self._skips(index, args, kwargs):
                return h_in
            if (known := self._known(index)) is not None:
                return mix(h_in, known, self._gate(index, known), 0.0)
            self.evaluated += 1
            if gates is None:
                out = forward(*args, **kwargs)
                self._observe(index, h_in, out)
                self.plain = isinstance(out, Tensor)
                return out
            closed = self._values[index] == 0.0
            if closed and self.lean:
                with torch.no_grad():
                    out = forward(*args, **kwargs)
            elif self.checkpoint_activations and torch.is_grad_enabled():
                out = checkpoint(forward, *args, use_reentrant=False, **kwargs)
            else:
                out = forward(*args, **kwargs)
            self._observe(index, h_in, out)
            h_out = first(out)
            value = self._values[index] if self.lean else None
            return with_first(out, mix(h_in, h_out, self._gate(index, h_out), value))

        return gated

    def _skips(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether a layer need not run: it is closed, its output is not read, it fills no cache."""
        closed = bool(self._values) and self._values[index] == 0.0
        read = torch.is_grad_enabled() or self._observer is not None
        return closed and not read and self.plain and not fills_cache(args, kwargs)

    def _known(self, index: int) -> Tensor | None:
        """Return the output of a closed layer if an earlier pass ran it, open, on the same stream."""
        closed = bool(self._values) and self._values[index] == 0.0
        if self._prefixes is None or index != self._prefixes.start or not closed:
            return None
        return self._prefixes.behind

    def _observe(self, index: int, h_in: Tensor, out: Any) -> None:
        if self._observer is not None:
            self._observer(index, h_in, first(out))


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """Put a model into eval mode and set ``requires_grad`` of all weights to false; return the model."""
    model.eval().requires_grad_(False)
    return model
