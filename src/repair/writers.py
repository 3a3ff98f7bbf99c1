"""Find the module of a layer that writes to the residual stream last.

A *writer* is a module whose output y is added to the stream, times a factor: ``out = h_mid + scale * y``. It
is found by experiment: noise that is added to y appears in ``out``, and changes nothing else. A writer has
features f, and can be changed so that the stream moves by ``f @ delta``. There are two kinds:

* a linear map: f is its input;
* a mixture of experts (:mod:`src.repair.experts`): f is its output before the change.

Shapes: B batch, T tokens, H hidden, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from src.data.batches import Batch
from src.errors import ConfigError
from src.models.head import TOLERANCE
from src.models.layers import decoder_layers, first, with_first
from src.repair.experts import Mixture, last_weights
from src.repair.stream import run


class Writer(Protocol):
    """A module that writes to the stream last in its layer, and that :func:`src.repair.fold.fold` changes.

    Attributes:
        name: path of the module inside the layer.
        constant: whether the last feature is the constant 1, which moves a bias.
    """

    @property
    def name(self) -> str: ...

    @property
    def constant(self) -> bool: ...

    @property
    def map_FH(self) -> Tensor:
        """What each feature but the constant adds to the stream, float64."""
        ...

    def watch(self, keep: Callable[[Tensor], None]) -> RemovableHandle:
        """Call ``keep`` with the features ``[B, T, F]`` of each forward pass, until the handle is removed."""
        ...

    def add(self, delta_FH: Tensor) -> None:
        """Change the weights so that the layer's output moves by ``f @ delta`` for features f."""
        ...


@dataclass(frozen=True)
class Linear:
    """A linear module whose output is added to the stream; its features are its input."""

    name: str
    module: nn.Linear | Conv1D
    scale: float

    @property
    def constant(self) -> bool:
        return self.module.bias is not None

    @property
    def map_FH(self) -> Tensor:
        weight = self.module.weight if isinstance(self.module, Conv1D) else self.module.weight.T
        return self.scale * weight.detach().double()

    def watch(self, keep: Callable[[Tensor], None]) -> RemovableHandle:
        return self.module.register_forward_pre_hook(lambda _m, args: keep(args[0]))

    def add(self, delta_FH: Tensor) -> None:
        delta_FH = delta_FH / self.scale
        weight, bias = self.module.weight, self.module.bias
        if bias is not None:
            delta_FH, delta_H = delta_FH[:-1], delta_FH[-1]
            bias.data += delta_H.to(bias)
        weight.data += (delta_FH if isinstance(self.module, Conv1D) else delta_FH.T).to(weight)


@dataclass(frozen=True)
class Call:
    """What a module was last called with, and what it returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    def has_size(self, numel: int) -> bool:
        """Return whether the output, or the first entry of a tuple, is a tensor of ``numel`` numbers."""
        tensor = self.out[0] if isinstance(self.out, tuple | list) and self.out else self.out
        return torch.is_tensor(tensor) and tensor.numel() == numel


@torch.no_grad()
def stream_writer(model: PreTrainedModel, index: int, batch: Batch, before: Writer | None = None) -> Writer:
    """Find the last linear map of a layer that writes to the stream, or else its mixture of experts.

    Args:
        model: the cut model.
        index: number of the layer.
        batch: rows, of which the first serves for the experiment.
        before: a writer of the layer, silent at present: the last one besides it is meant, such as the
            attention's beside the feed-forward's.

    Raises:
        ConfigError: the layer has neither. Either a norm follows its last linear map, or its experts add
            something that is not linear in their weights, such as their own input.
    """
    layers = decoder_layers(model)[1]
    layer, others = layers[index], {id(p) for i, m in enumerate(layers) if i != index for p in m.parameters()}
    tolerance = TOLERANCE[str(model.dtype).removeprefix("torch.")]
    calls = _calls(model, index, {key: value[:1] for key, value in batch.items()})
    out_BTH = first(calls[""].out)
    names = [name for name, call in calls.items() if name and call.has_size(out_BTH.numel())]
    around = f"{before.name}." if before else ""
    modules = {n: layer.get_submodule(n) for n in reversed(names) if not around.startswith(f"{n}.")}
    linears = {name: m for name, m in modules.items() if isinstance(m, nn.Linear | Conv1D)}
    for name, module in linears.items():
        if id(module.weight) not in others and (scale := _scale(layer, calls, name, tolerance)):
            return Linear(name, module, scale)
    writing: list[str] = []
    for name in [name for name in modules if name not in linears]:
        if scale := _scale(layer, calls, name, tolerance):
            weights = last_weights(modules[name], calls[name].args, calls[name].kwargs, others, tolerance)
            if weights:
                return Mixture(name, modules[name], scale, weights)
            writing.append(f"{name} ({type(modules[name]).__name__})")
    raise ConfigError(
        f"patch: nothing can be folded into layer {index} of this '{model.config.model_type}': none of its "
        f"linear maps writes straight to the residual stream, and what does, "
        f"{', '.join(writing) or 'no module'}, has no weights that could hold a linear map, as experts' down "
        f"projections can. Leave the repair out."
    )


def _calls(model: PreTrainedModel, index: int, batch: Batch) -> dict[str, Call]:
    """Return the last call of each module of a layer that has weights, in the order of their ends.

    The layer itself is "".
    """
    layer, calls = decoder_layers(model)[1][index], dict[str, Call]()

    def record(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            calls.pop(name, None)  # so that the order is that of the last calls
            calls[name] = Call(args, kwargs, out)

        return hook

    with ExitStack() as stack:
        for name, module in layer.named_modules():
            if any(True for _ in module.parameters()):
                stack.callback(module.register_forward_hook(record(name), with_kwargs=True).remove)
        run(model, batch, index)
    return calls


def _scale(layer: nn.Module, calls: dict[str, Call], name: str, tolerance: float) -> float | None:
    """Return the factor with which a module's output is added to the layer's output; None if it is not."""
    call, out_BTH = calls[""], first(calls[""].out)
    noise_BTH = torch.randn(out_BTH.shape, generator=torch.Generator().manual_seed(0)).to(out_BTH)
    noise_BTH *= out_BTH.std()
    shaped = noise_BTH.view(first(calls[name].out).shape)
    hook = layer.get_submodule(name).register_forward_hook(
        lambda _m, _a, output: with_first(output, first(output) + shaped)
    )
    try:
        moved_BTH = (first(layer(*call.args, **call.kwargs)) - out_BTH).float()
    finally:
        hook.remove()
    noise = noise_BTH.float()
    scale = float((moved_BTH * noise).sum() / noise.square().sum())
    error = float((moved_BTH - scale * noise).norm() / moved_BTH.norm())
    return scale if error < tolerance else None
