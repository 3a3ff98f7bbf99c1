"""Fold a repair of the residual stream into the last linear map that writes to it.

A stock model has no place for a linear map P of its stream, and neither place where P could hide holds it:

* *In what a layer adds.* That is a function of ``norm(h)``, the same for h and for 2 h, while what P asks the
  layer to add, ``h P - h``, doubles. Both can be only where ``h P = h``.
* *In all that reads and writes the stream after it*, as a change of basis. Readers see ``norm(h)``, so P
  would have to preserve the norm of every h up to one factor. P is symmetric with eigenvalues d > 0, so only
  equal d do.

What can be had is the best approximation. A layer ends in  ``out = h_mid + c a W^T``  with W the down
projection of its MLP and a that projection's input. Then

    W' = argmin  sum over tokens of  w |out(W') - target|^2  +  ridge on W' - W

is one ridge regression of the residual ``target - out`` on a. (ReplaceMe, arXiv 2505.02819, works at the same
place and multiplies W by an H x H map; here W' is free.) The weights ``w = 1 / |target|^2`` make the error of
a token relative, as the next norm sees it; else the few tokens of huge norm that trained models have would
decide alone. The ridge is relative to each feature's own power, so it does not depend on their scales.

Shapes: B batch, T tokens, H hidden, F features of the down projection, N tokens that are not padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from src.data.batches import Batch
from src.errors import ConfigError
from src.models.head import TOLERANCE
from src.models.layers import decoder_layers, first
from src.repair.stream import run


@dataclass(frozen=True)
class Writer:
    """A linear module through which a layer writes to the stream: ``out = h_mid + scale * linear(a)``."""

    name: str
    linear: nn.Linear | Conv1D
    scale: float

    def add(self, delta_FH: Tensor) -> None:
        """Move the layer's output by ``a @ delta``; the last row goes to the bias, if there is one."""
        delta_FH = delta_FH / self.scale
        weight, bias = self.linear.weight, self.linear.bias
        if bias is not None:
            delta_FH, delta_H = delta_FH[:-1], delta_FH[-1]
            bias.data += delta_H.to(bias)
        weight.data += (delta_FH if isinstance(self.linear, Conv1D) else delta_FH.T).to(weight)


@torch.no_grad()
def stream_writer(model: PreTrainedModel, index: int, batch: Batch) -> Writer:
    """Return the last linear module of a layer whose output reaches the layer's as it is, up to a factor.

    It is found by its behaviour, not by a family's names: the layer runs again with noise added to what
    the module gives, and its output must move by that noise.

    Args:
        model: the cut model.
        index: the layer.
        batch: rows to try it on; the first is taken.

    Raises:
        ConfigError: the layer has none, because a norm or routed experts stand in between.
    """
    layers = decoder_layers(model)[1]
    layer, others = layers[index], {id(p) for i, m in enumerate(layers) if i != index for p in m.parameters()}
    calls: dict[str, Any] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            calls.pop(name, None)  # the order is that of the last calls
            calls[name] = (args, kwargs, out)

        return hook

    linears = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    linears = {n: m for n, m in linears.items() if id(m.weight) not in others}
    hooks = [m.register_forward_hook(record(n), with_kwargs=True) for n, m in [("", layer), *linears.items()]]
    try:
        run(model, {key: value[:1] for key, value in batch.items()})
    finally:
        for handle in hooks:
            handle.remove()
    args, kwargs, out = calls.pop("")
    out_BTH = first(out)
    noise_BTH = torch.randn(out_BTH.shape, generator=torch.Generator().manual_seed(0)).to(out_BTH)
    noise_BTH *= out_BTH.std()
    for name in reversed(
        [n for n, (_, _, y) in calls.items() if torch.is_tensor(y) and y.numel() == out_BTH.numel()]
    ):
        shaped = noise_BTH.view(calls[name][2].shape)
        hook = linears[name].register_forward_hook(lambda _m, _a, y, shaped=shaped: y + shaped)
        moved_BTH = (first(layer(*args, **kwargs)) - out_BTH).float()
        hook.remove()
        noise = noise_BTH.float()
        scale = float((moved_BTH * noise).sum() / noise.square().sum())
        error = float((moved_BTH - scale * noise).norm() / moved_BTH.norm())
        if error < TOLERANCE[str(model.dtype).removeprefix("torch.")]:
            return Writer(name, linears[name], scale)
    raise ConfigError(
        f"patch: nothing can be folded into layer {index} of this '{model.config.model_type}': none of its "
        f"linear maps ({', '.join(linears) or 'it has none'}) writes straight to the residual stream; a norm "
        f"or routed experts stand in between. Leave the repair out."
    )


class Regression:
    """Weighted ridge regression of residuals on features, from sums in float64.

    Args:
        constant: whether a last feature that is always 1 is added, for a bias.
    """

    def __init__(self, constant: bool = False) -> None:
        self.constant, self.tokens = constant, 0
        nothing = torch.zeros((), dtype=torch.float64)
        self.gram_FF = self.cross_FH = self.energy = nothing

    def add(self, a_NF: Tensor, residual_NH: Tensor, weight_N: Tensor) -> None:
        """Add some tokens to the sums."""
        a_NF, residual_NH, weight_N = a_NF.double(), residual_NH.double(), weight_N.double()
        if self.constant:
            a_NF = torch.cat([a_NF, torch.ones_like(a_NF[:, :1])], 1)
        weighted_FN = (a_NF * weight_N[:, None]).T
        self.gram_FF = self.gram_FF + weighted_FN @ a_NF
        self.cross_FH = self.cross_FH + weighted_FN @ residual_NH
        self.energy = self.energy + weight_N @ residual_NH.square().sum(-1)
        self.tokens += len(a_NF)

    def solve(self, ridge: float) -> Tensor:
        """Return the coefficients ``[F, H]``; ``ridge`` is relative to each feature's power."""
        power_F = self.gram_FF.diagonal()
        floor = 1e-12 * power_F.mean()  # a feature that never fires gets no weight, and no division by zero
        coefficients: Tensor = torch.linalg.solve(
            self.gram_FF + torch.diag(ridge * power_F + floor), self.cross_FH
        )
        return coefficients

    def error(self, coefficients_FH: Tensor) -> float:
        """Return the weighted mean square of the residuals that these coefficients leave."""
        fitted = (coefficients_FH * (self.gram_FF @ coefficients_FH - 2 * self.cross_FH)).sum()
        return float(self.energy + fitted) / max(1, self.tokens)


Target = Callable[[Batch, Tensor], Tensor]
"""``(batch, h_BTH) -> target_BTH``: what the output of a layer should be."""


@dataclass(frozen=True)
class Repair:
    """The outcome of one fold.

    Attributes:
        module: dotted name of the changed module.
        before: mean squared relative error of the stream on the calibration rows, with the old weights.
        after: the same error with the new weights.
    """

    module: str
    before: float
    after: float


@torch.no_grad()
def fold(
    student: PreTrainedModel, index: int, batches: Iterable[Batch], target: Target, ridge: float
) -> Repair:
    """Change one linear map so that the output of layer ``index`` comes nearest to a target.

    Args:
        student: the cut model, changed in place.
        index: the layer.
        batches: calibration rows, at least one batch.
        target: gives the output that the layer should have.
        ridge: strength of the pull towards the present weights.

    Raises:
        ConfigError: see :func:`stream_writer`.
    """
    path, layers = decoder_layers(student)
    batches = list(batches)
    writer = stream_writer(student, index, batches[0])
    regression = Regression(constant=writer.linear.bias is not None)
    last: dict[str, Tensor] = {}
    hooks = [
        layers[index].register_forward_hook(lambda _m, _a, out: last.update(h=first(out))),
        writer.linear.register_forward_pre_hook(lambda _m, args: last.update(a=args[0])),
    ]
    try:
        for batch in batches:
            real_N = run(student, batch)
            h_BTH, a_NF = last["h"], last["a"].flatten(0, -2)[real_N]
            target_NH = target(batch, h_BTH).flatten(0, 1)[real_N].double()
            residual_NH = target_NH - h_BTH.flatten(0, 1)[real_N]
            regression.add(a_NF, residual_NH, 1 / target_NH.square().sum(-1))
    finally:
        for handle in hooks:
            handle.remove()
    delta_FH = regression.solve(ridge)
    writer.add(delta_FH)
    nothing = torch.zeros_like(delta_FH)
    return Repair(f"{path}.{index}.{writer.name}", regression.error(nothing), regression.error(delta_FH))
