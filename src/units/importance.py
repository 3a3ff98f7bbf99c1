"""Score the units of a student as it is now, and divide a removal of width among its layers.

As Adapt-Pruner (arXiv 2502.03460). Layer l matters by how far it turns the stream, ``I_l = - mean cos(h_l,
h_{l+1})`` over tokens, centred over layers and divided by ``max |I|``. It loses the share s_l of its width:

    s_l  <-  clip(s_l + (S - mean s) - A I_l),    S the next mean,

in those KV groups or channels whose weights have the smallest sum of ``|w dLoss/dw|``. *Ours*: the similarity
of halves; and as clipping changes the mean, all shares are shifted until it is S.

Shapes: B batch, T tokens, L layers, U units, W units of width in each layer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from src.mask import Unit
from src.models.layers import decoder_layers, first, stream_in
from src.models.streams import silenced
from src.training.ranks import total, world
from src.units.halves import find_halves
from src.units.width import Width


@torch.no_grad()
def block_influence(student: PreTrainedModel, unit: Unit, real_BT: Tensor, run: Callable[[], Any]) -> Tensor:
    """Return ``1 - cos`` ``[U]`` of the stream before and behind each unit, the mean over all ranks' tokens.

    Args:
        student: a decoder.
        unit: ``half`` for halves; else a unit is a layer. The stream between two halves is what the layer
            gives when its feed-forward adds nothing.
        real_BT: false at padding.
        run: runs the student on the batch, without a cache.
    """
    layers = decoder_layers(student)[1]
    halves = find_halves(student) if unit == "half" else []
    found: dict[int, list[Tensor]] = {}
    with ExitStack() as hooks:
        for index, layer in enumerate(layers):

            def see(layer: nn.Module, args: Any, kwargs: Any, out: Any, index: int = index) -> None:
                stream = [stream_in(args, kwargs), first(out)]
                if halves:
                    with silenced(layer.get_submodule(halves[index].writers[1])):
                        stream.insert(1, first(layer.forward(*args, **kwargs)))
                kept = [h_BTH[real_BT].double() for h_BTH in stream]
                found[index] = [
                    nn.functional.cosine_similarity(a, b, dim=-1).sum() for a, b in pairwise(kept)
                ]

            hooks.callback(layer.register_forward_hook(see, with_kwargs=True).remove)
        run()
    cosines_U = torch.stack([cosine for index in range(len(layers)) for cosine in found[index]])
    return 1 - total(cosines_U).cpu() / total(real_BT.sum()).cpu()


def centred(importance_L: Tensor) -> Tensor:
    """Return importances with mean 0 and largest size 1; zeros if all are equal."""
    from_mean_L = importance_L - importance_L.mean()
    return from_mean_L / from_mean_L.abs().max().clamp_min(torch.finfo(from_mean_L.dtype).tiny)


def sparsities(before_L: Tensor, importance_L: Tensor, mean: float, amplitude: float, most: float) -> Tensor:
    """Return which share of its width each layer has lost after the next removal.

    Args:
        before_L: shares so far; no layer gets anything back.
        importance_L: importances, centred.
        mean: mean of the new shares, at least that of ``before_L``.
        amplitude: A, by which an importance of 1 lowers a share.
        most: largest share, at least ``mean``. At ``mean`` all shares are equal.
    """
    aimed_L = before_L + (mean - before_L.mean()) - amplitude * importance_L
    low, high, most_L = before_L.min() - aimed_L.max(), most - aimed_L.min(), torch.full_like(before_L, most)
    for _ in range(80):
        shift = (low + high) / 2
        under = (aimed_L + shift).clamp(before_L, most_L).mean() < mean
        low, high = (shift, high) if under else (low, shift)
    return (aimed_L + high).clamp(before_L, most_L)


def taylor(student: PreTrainedModel, width: Width, loss: Tensor) -> Tensor:
    """Return the sum ``[L, W]`` of ``|w dLoss/dw|`` over each unit's weights, without biases.

    Args:
        student: a decoder.
        width: where its units lie.
        loss: of this rank's rows, with its graph; the mean over the ranks is differentiated.
    """
    layers = decoder_layers(student)[1]
    weights = [
        (index, block, layers[index].get_parameter(name))
        for index, blocks in enumerate(width.blocks)
        for name, block in blocks.items()
        if name in dict(layers[index].named_parameters()) and not name.endswith("bias")
    ]
    grads = torch.autograd.grad(loss, [weight for _, _, weight in weights])
    scores_LW = torch.zeros(len(layers), width.count, dtype=torch.float64)
    for (index, block, weight), grad in zip(weights, grads, strict=True):
        scores_LW[index] += block.sums((weight.detach().double() * total(grad) / world()).abs()).cpu()
    return scores_LW
