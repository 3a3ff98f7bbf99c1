"""Fold a repair of the residual stream into the last weights that write to it.

A repair is an ``H x H`` map P that turns the stream h in front of a layer into ``h P``
(:mod:`src.repair.stream`). A stock model has no place for it, and neither place where P could hide holds it:

* *In what a layer adds.* That is a function of ``norm(h)``, the same for h and for 2 h, while what P asks the
  layer to add, ``h P - h``, doubles. Both can be only where ``h P = h``.
* *In all that reads and writes the stream after it*, as a change of basis. Readers see ``norm(h)``, so P
  would have to preserve the norm of every h up to one factor. P is symmetric with eigenvalues d > 0, so only
  equal d do.

What can be had is the best approximation. A layer ends in ``out = h_mid + c a W^T`` with W the down
projection of its MLP and a that projection's input. Then

    W' = argmin  sum over tokens of  w |out(W') - target|^2  +  ridge on W' - W

is one ridge regression of the residual ``target - out`` on a. (ReplaceMe, arXiv 2505.02819, works at the same
place and multiplies W by an H x H map; here W' is free.) The weights ``w = 1 / |target|^2`` make the error of
a token relative, as the next norm sees it; else the few tokens of huge norm that trained models have would
decide alone. The ridge is relative to each feature's own power, so it does not depend on their scales. Where
the MLP is a mixture of experts, what they write together takes the place of a, and the experts hold the H x H
map that is found: :mod:`src.repair.experts`.

Shapes: B batch, T tokens, H hidden, F features of the writer, N tokens that are not padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from src.data.batches import Batch
from src.models.layers import decoder_layers, first
from src.repair.stream import run
from src.repair.writers import Writer, stream_writer
from src.training.progress import track


class Regression:
    """Weighted ridge regression of residuals on features; it sums over tokens in float64.

    Args:
        constant: whether a last feature that is always 1 is added, for a bias.
    """

    def __init__(self, constant: bool = False) -> None:
        self.constant, self.tokens = constant, 0
        nothing = torch.zeros((), dtype=torch.float64)
        self.gram_FF = self.cross_FH = self.energy = nothing

    def add(self, a_NF: Tensor, residual_NH: Tensor, weight_N: Tensor) -> None:
        """Add some tokens to the sums.

        Args:
            a_NF: features.
            residual_NH: what the coefficients should give.
            weight_N: weight of each token.
        """
        a_NF, residual_NH, weight_N = a_NF.double(), residual_NH.double(), weight_N.double()
        if self.constant:
            a_NF = torch.cat([a_NF, torch.ones_like(a_NF[:, :1])], 1)
        weighted_FN = (a_NF * weight_N[:, None]).T
        self.gram_FF = self.gram_FF + weighted_FN @ a_NF
        self.cross_FH = self.cross_FH + weighted_FN @ residual_NH
        self.energy = self.energy + weight_N @ residual_NH.square().sum(-1)
        self.tokens += len(a_NF)

    def solve(self, ridge: float) -> Tensor:
        """Return the coefficients ``[F, H]`` that minimise the weighted squared error and the ridge.

        Args:
            ridge: penalty on a feature's coefficients, relative to its power ``sum over tokens of w a^2``.
        """
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
    """The outcome of one fold: which module changed, and how much nearer its layer's output is to the target.

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
    """Change the last weights of layer ``index`` so that its output comes nearest to a target.

    Args:
        student: the cut model, changed in place.
        index: the layer.
        batches: calibration rows, at least one batch.
        target: called with a batch and the layer's output ``[B, T, H]``; returns what that should be.
        ridge: strength of the pull towards the present weights.

    Raises:
        ConfigError: see :func:`src.repair.writers.stream_writer`.
    """
    batches = list(batches)
    writer = stream_writer(student, index, batches[0])
    regression = regress(student, index, writer, batches, target)
    return change(student, index, writer, regression, regression.solve(ridge))


@torch.no_grad()
def regress(
    student: PreTrainedModel, index: int, writer: Writer, batches: Iterable[Batch], target: Target
) -> Regression:
    """Return the regression of what layer ``index`` lacks on the features of one of its writers.

    Args:
        student: the cut model.
        index: the layer.
        writer: a module of the layer that writes to the stream.
        batches: calibration rows.
        target: called with a batch and the layer's output ``[B, T, H]``; returns what that should be.
    """
    layers, last = decoder_layers(student)[1], dict[str, Tensor]()
    regression = Regression(writer.constant)
    hooks = [
        layers[index].register_forward_hook(lambda _m, _a, out: last.update(h=first(out))),
        writer.watch(lambda features: last.update(a=features)),
    ]
    try:
        for batch in track(batches, "calibration batches"):
            real_N = run(student, batch, index)
            h_BTH, a_NF = last["h"], last["a"].flatten(0, -2)[real_N]
            target_NH = target(batch, h_BTH).flatten(0, 1)[real_N].double()
            residual_NH = target_NH - h_BTH.flatten(0, 1)[real_N]
            regression.add(a_NF, residual_NH, 1 / target_NH.square().sum(-1))
    finally:
        for handle in hooks:
            handle.remove()
    return regression


def change(
    student: PreTrainedModel, index: int, writer: Writer, regression: Regression, delta_FH: Tensor
) -> Repair:
    """Let a writer of layer ``index`` add ``features @ delta`` to the stream besides; return the outcome."""
    writer.add(delta_FH)
    name = f"{decoder_layers(student)[0]}.{index}.{writer.name}"
    return Repair(name, regression.error(torch.zeros_like(delta_FH)), regression.error(delta_FH))
