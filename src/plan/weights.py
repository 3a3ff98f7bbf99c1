"""Compute the bytes of a model's weights: whole, by layer, and quantised."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from src.models.layers import decoder_layers
from src.models.loading import Quantization

NF4_BLOCK = 64
"""Weights that share one float32 scale (bitsandbytes' default)."""


@dataclass(frozen=True)
class Weights:
    """Holds the sizes of a model's weights, in bytes.

    Attributes:
        whole: all weights, as loaded.
        layer: the largest decoder layer.
        root: all weights outside the decoder layers.
        int8: all weights, with 8-bit linear layers.
        nf4: all weights, with 4-bit linear layers.
        widest: the largest linear layer, unpacked: quantised layers are unpacked one at a time for use.
    """

    whole: int
    layer: int
    root: int
    int8: int
    nf4: int
    widest: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Weights:
        """Measure a model; its weights may be on the meta device."""
        layers = [size(layer) for layer in decoder_layers(model)[1]]
        whole = size(model)
        linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
        head: nn.Module | None = model.get_output_embeddings()
        packed = [w for w in linear if head is None or w is not head.weight]  # bitsandbytes leaves the head
        plain = whole - sum(w.nbytes for w in packed)
        return cls(
            whole=whole,
            layer=max(layers),
            root=whole - sum(layers),
            int8=plain + sum(w.numel() + 4 * len(w) for w in packed),
            nf4=plain + sum(w.numel() // 2 + 4 * math.ceil(w.numel() / NF4_BLOCK) for w in packed),
            widest=max((w.nbytes for w in packed), default=0),
        )

    def held(self, quantize: Quantization | None) -> int:
        """Return how many bytes all weights take under a quantisation; None is as loaded."""
        return {None: self.whole, "int8": self.int8, "nf4": self.nf4}[quantize]


def tensors(model: nn.Module) -> list[Tensor]:
    """Return the parameters (tied ones once) and the buffers of a model."""
    return [*model.parameters(), *model.buffers()]


def size(model: nn.Module) -> int:
    """Return the bytes of all :func:`tensors` of a model."""
    return sum(x.nbytes for x in tensors(model))
