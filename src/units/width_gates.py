"""Gates on the width of decoder layers: each multiplies its unit's part of the input of a linear map.

That map (the *writer*) writes to the residual stream: it is the output projection of the attention for KV
groups, the down projection for channels. So a closed unit adds nothing, as if its rows and columns were cut
out. Its sums run over more numbers than in the cut model, and in another order: both agree to rounding, not
to the bit.

Shapes: B batch, T tokens, L layers, W units in each, U = L W units, layer after layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from src.mask import Unit
from src.models.gated import Gates
from src.models.layers import Arguments, decoder_layers, first, stream_in
from src.models.structure import Misfit, alike
from src.units.halves import layer_calls
from src.units.width import INPUT, Width, find_width, misfit_of

Forward = Callable[..., Any]
Watcher = Callable[[int, Tensor], None]
"""Called as ``see(layer, x)`` with the input of a writer."""
LOUD = 30.0
"""Size of the noise in a trial, far above that of features."""


class WidthGates(Gates):
    """Puts gates on the width units of all layers of ``model``; they are open until :meth:`use` closes some.

    Modules keep their class, attributes and state-dict keys: only the bound ``forward`` of some is replaced,
    and :meth:`remove` restores it.

    Args:
        unit: kind of the units, ``kv_group`` or ``channel``.
        model: a decoder whose layers all have such units.
        checkpoint_activations: recompute layers in the backward pass instead of storing them.

    Attributes:
        width: which tensors hold the units, and where.

    Raises:
        Misfit: the layers do not hold such units in a way that can be cut.
    """

    def __init__(self, unit: Unit, model: PreTrainedModel, checkpoint_activations: bool = False) -> None:
        super().__init__()
        self.path, self.layers = decoder_layers(model)
        self.checkpoint_activations = checkpoint_activations
        self.width = tried_width(model, unit)
        self.each = self.width.count
        self._watcher: Watcher | None = None
        self._restore = ExitStack()
        for index, layer in enumerate(self.layers):
            self._replace(layer, self._counted(index, layer.forward))
            writer = layer.get_submodule(self.width.writers[index])
            self._replace(writer, self._gated(index, writer.forward))

    def share(self, layer: int, name: str, values: Tensor) -> Tensor:
        block = self.width.blocks[layer].get(name)
        return values.new_zeros(self.width.count) if block is None else block.sums(values)

    @contextmanager
    def watched(self, see: Watcher) -> Iterator[None]:
        """Pass the input of each writer to ``see(layer, x)`` whenever the model runs in the block.

        ``x`` is ``[B, T, features]``, with the features of a unit beside each other.
        """
        self._watcher = see
        try:
            yield
        finally:
            self._watcher = None

    def remove(self) -> None:
        """Give the modules their own ``forward`` back."""
        self._restore.close()

    def _replace(self, module: nn.Module, forward: Forward) -> None:
        module.forward = forward
        self._restore.callback(delattr, module, "forward")

    def _counted(self, index: int, forward: Forward) -> Forward:
        """Return the forward of a layer that is counted, observed, and recomputed if that is asked."""

        def run(gates_U: Tensor | None, *args: Any, **kwargs: Any) -> Any:
            before, self._gates = self._gates, gates_U  # a recomputation runs outside of `use`
            try:
                return forward(*args, **kwargs)
            finally:
                self._gates = before

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.evaluated += 1
            if self.checkpoint_activations and torch.is_grad_enabled():
                out = checkpoint(run, self._gates, *args, use_reentrant=False, **kwargs)
            else:
                out = forward(*args, **kwargs)
            if self._observer is not None:
                self._observer(index, stream_in(args, kwargs), first(out))
            return out

        return counted

    def _gated(self, index: int, forward: Forward) -> Forward:
        """Return a forward that runs a writer on its input times the gates of its layer."""
        count = self.width.count

        def gated(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._watcher is not None:
                self._watcher(index, x)
            if self._gates is not None:
                gates = self._gate(slice(index * count, (index + 1) * count), x)
                x = x * gates.repeat_interleave(x.shape[-1] // count, -1)
            return forward(x, *args, **kwargs)

        return gated


@torch.no_grad()
def tried_width(model: PreTrainedModel, unit: Unit) -> Width:
    """Return where the KV groups or channels of a model lie, after a trial on one layer of each structure.

    The trial adds noise to the outputs of the input projections that belong to one unit. The layer's output
    must change if the unit's gate is 1, and must not if it is 0. A model on ``meta`` is not tried.

    Args:
        model: a decoder.
        unit: ``kv_group`` or ``channel``.

    Raises:
        Misfit: :func:`find_width` finds no such units; or the projections do not hold them in order; or what
            one computes reaches the residual stream past its own columns of the writer.
    """
    width = find_width(model.config, unit, type(model))
    _, layers = decoder_layers(model)
    if model.device.type == "meta":  # nothing to try: a plan
        return width
    calls = layer_calls(model)
    for kind in alike(layers):
        index = min(kind)
        trial = _Trial(layers[index], calls[index], width, index)
        with misfit_of(model.config, index, layers[index], unit):
            for tried in {0, width.count // 2, width.count - 1}:
                trial.of(tried)
    return width


class _Trial:
    """Runs a layer on the arguments of one call, with a unit closed and with noise on what it computes."""

    def __init__(self, layer: nn.Module, call: Arguments, width: Width, index: int) -> None:
        self.layer, (self.args, self.kwargs), self.width = layer, call, width
        self.writer, self.blocks = width.writers[index], width.blocks[index]

    def of(self, unit: int) -> None:
        """Check that noise on what a unit computes changes the layer's output if it is open, and only then.

        Args:
            unit: number of the unit in its layer.

        Raises:
            Misfit: with the unit open nothing changes, so its rows lie elsewhere; or with it closed something
                does, so it reaches the stream past its columns of the writer.
        """
        if torch.equal(self.run(unit), self.run(unit, noisy=True)):
            raise Misfit("does not hold its rows in the order of the units")
        if not torch.equal(self.run(unit, closed=True), self.run(unit, closed=True, noisy=True)):
            raise Misfit(
                f"lets what one of them computes reach the stream past its own columns of '{self.writer}' (a "
                f"norm over all of them does so, or rows in another order, as in a fused projection)"
            )

    def run(self, unit: int, closed: bool = False, noisy: bool = False) -> Tensor:
        """Run the layer; return the stream ``[B, T, H]`` behind it.

        Args:
            unit: number of a unit in the layer.
            closed: the unit adds nothing.
            noisy: noise is added to what the unit's rows compute.
        """
        with ExitStack() as stack:
            writer = self.layer.get_submodule(self.writer)

            def close(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                return (self._part(args[0], unit, 0.0 if closed else 1.0, 0.0), *args[1:])

            stack.callback(writer.register_forward_pre_hook(close).remove)
            for path in {name.rpartition(".")[0] for name in self.blocks} - {self.writer} if noisy else ():
                module = self.layer.get_submodule(path)
                if type(module) in INPUT:
                    hook = module.register_forward_hook(lambda _m, _i, y: self._part(y, unit, 1.0, LOUD))
                    stack.callback(hook.remove)
            return first(self.layer(*self.args, **self.kwargs)).clone()

    def _part(self, x: Tensor, unit: int, factor: float, shift: float) -> Tensor:
        """Multiply the features of one unit in ``x [..., features]`` by a factor, and shift them."""
        each = x.shape[-1] // self.width.count
        part = x[..., unit * each : (unit + 1) * each]
        sign = torch.ones(x.shape[-2], 1, device=x.device, dtype=x.dtype)
        sign[::2] = -1.0  # of both signs, since some activations are deaf to one
        return torch.cat(
            [x[..., : unit * each], part * factor + sign * shift, x[..., (unit + 1) * each :]], -1
        )
