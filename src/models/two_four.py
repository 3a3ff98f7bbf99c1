"""Two of four: of each four weights in a row that meet four neighbouring inputs, at most two are not zero.

The pattern is along the input dimension, as sparse matrix units of GPUs read it. It is that of the linear
maps in the decoder layers. Embeddings, the output head, norms and tensors that hold several experts stay
dense.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from src.models.layers import decoder_layers
from src.units.width import INPUT

KEPT, OF = 2, 4


def linear_maps(model: PreTrainedModel) -> dict[str, tuple[nn.Parameter, int]]:
    """Return the weights that the pattern is for, by name in the list of layers, each with its input axis.

    A map whose number of inputs is no multiple of four is left out.
    """
    maps = decoder_layers(model)[1].named_modules()
    weights = {name: (m.get_parameter("weight"), INPUT[type(m)]) for name, m in maps if type(m) in INPUT}
    return {name: (w, axis) for name, (w, axis) in weights.items() if w.ndim == 2 and not w.shape[axis] % OF}


def two_of_four(weight: Tensor, axis: int) -> Tensor:
    """Return which entries of a matrix are among the two largest of their four along an axis, as bool."""
    fours = _fours(weight.detach().abs(), axis)
    kept = torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, fours.topk(KEPT, -1).indices, True)
    return kept.flatten(-2).movedim(-1, axis)


def crowded(model: PreTrainedModel) -> int:
    """Return how many fours in the linear maps of a model have more than two entries that are not zero."""
    counts = (_fours(weight != 0, axis).sum(-1) for weight, axis in linear_maps(model).values())
    return sum(int((count > KEPT).sum()) for count in counts)


def _fours(matrix: Tensor, axis: int) -> Tensor:
    """Return a matrix with the axis last and divided into fours, ``[..., inputs / 4, 4]``."""
    fours: Tensor = matrix.movedim(axis, -1).unflatten(-1, (-1, OF))
    return fours
